"""Compile and call the C kernels (rm/csrc): built once for a machine, on first use. Owns the foreign calls.

The shared library lies in the cache folder under a hash of source, command and processor. Where no C compiler with
OpenMP is at hand, or none succeeds, `reason_missing` says why and callers take another backend.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from rm.backbone import cache_folder
from rm.layout import TreeLayout
from rubric_data.errors import UserError
from rubric_data.files import atomic_path

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = (
    "-O3 -march=native -std=gnu11 -fPIC -shared -fopenmp -Wno-unknown-pragmas "
    # sums may be reordered, for the compiler to use vectors; infinities keep their meaning
    "-fassociative-math -fno-signed-zeros -fno-trapping-math -fno-math-errno"
)
_COMPILE_SECONDS = 120
_WITHOUT_RESULT = ("rms_norm_forward", "rms_norm_backward", "silu_mul_forward", "silu_mul_backward", "rotate")
_log = logging.getLogger(__name__)


class _Problem(ctypes.Structure):
    """`problem` of tree_attention.c, field by field."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in ("heads", "kv_heads", "width", "bfloat16", "threads", "amx", "families", "trees")
        ),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("start", "length", "parent")),
        *((name, ctypes.c_void_p) for name in ("family_parent", "family_first", "members", "tree_first")),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "lse")),
        *((name, ctypes.c_void_p) for name in ("grad_out", "grad_query", "grad_key", "grad_value")),
    )


def forward(query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, layout: TreeLayout, scale: float):
    """Attention (T, H, D) in the inputs' dtype, float32 or bfloat16, and log2-sum-exp2 of the scores (T, H) float32."""
    query, key, value = (x.contiguous() for x in (query_THD, key_TGD, value_TGD))
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:2])
    _call(
        "tree_attention_forward",
        _problem(query, key, layout, scale),
        query=query,
        key=key,
        value=value,
        out=out,
        lse=lse,
    )
    return out, lse


def backward(
    grad_THD: Tensor,
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    out_THD: Tensor,
    lse_TH: Tensor,
    layout: TreeLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in the inputs' dtype; ``out`` and ``lse`` are what `forward` returned."""
    query, key, value, grad = (x.contiguous() for x in (query_THD, key_TGD, value_TGD, grad_THD))
    grad_query = torch.empty_like(query)
    grad_key, grad_value = (torch.zeros(key.shape) for _ in range(2))
    _call(
        "tree_attention_backward", _problem(query, key, layout, scale),
        query=query, key=key, value=value, out=out_THD, lse=lse_TH,
        grad_out=grad, grad_query=grad_query, grad_key=grad_key, grad_value=grad_value,
    )  # fmt: skip
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


class _Elementwise(ctypes.Structure):
    """`elementwise` of elementwise.c, field by field."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("width", "bfloat16", "threads", "heads", "back")),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "grad", "out", "inverse")),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine", "gate", "up", "grad_gate", "grad_up")),
    )


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Rows of x (..., D) over their root mean square, times ``weight``; and the inverse of that mean (rows,)."""
    x = x.contiguous()
    out, inverse = torch.empty_like(x), torch.empty(x.shape[:-1].numel())
    _call("rms_norm_forward", _rows(x, epsilon), x=x, weight=weight_D, out=out, inverse=inverse)
    return out, inverse


def rms_norm_backward(grad: Tensor, x: Tensor, weight_D: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of x in `rms_norm`; the weight's is not computed."""
    grad, x = grad.contiguous(), x.contiguous()
    out = torch.empty_like(x)
    _call("rms_norm_backward", _rows(x), grad=grad, x=x, weight=weight_D, inverse=inverse, out=out)
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up, of equal shapes (..., D)."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _call("silu_mul_forward", _rows(gate), gate=gate, up=up, out=out)
    return out


def silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up in `silu_mul`."""
    grad, gate, up = (x.contiguous() for x in (grad, gate, up))
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    _call("silu_mul_backward", _rows(gate), grad=grad, gate=gate, up=up, grad_gate=grad_gate, grad_up=grad_up)
    return grad_gate, grad_up


def rotate(x_THD: Tensor, cosine_TD: Tensor, sine_TD: Tensor, *, back: bool = False) -> Tensor:
    """Rotary positions of x (T, H, D): x * cosine + half_turn(x) * sine; with ``back``, the gradient of x."""
    x, cosine, sine = (y.contiguous() for y in (x_THD, cosine_TD, sine_TD))
    out, rows = torch.empty_like(x), _rows(x)
    rows.heads, rows.back = x.shape[1], back
    _call("rotate", rows, x=x, cosine=cosine, sine=sine, out=out)
    return out


def supports(x: Tensor) -> bool:
    """Whether the kernels take ``x``: on CPU, float32 or bfloat16."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def _rows(x: Tensor, epsilon: float = 0.0) -> _Elementwise:
    return _Elementwise(
        rows=x.shape[:-1].numel(),
        width=x.shape[-1],
        bfloat16=x.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        epsilon=epsilon,
    )


def reason_missing() -> str | None:
    """Why there is no compiled kernel on this machine, in one line; None if there is."""
    return _library()[1]


@functools.cache
def has_matrix_tiles() -> bool:
    """Whether products of bfloat16 run on the processor's matrix tiles (Intel AMX)."""
    library, _ = _library()
    return library is not None and bool(library.amx_ready())


def _problem(query: Tensor, key: Tensor, layout: TreeLayout, scale: float) -> _Problem:
    if not supports(query):
        raise ValueError(f"cpu_tree: takes float32 or bfloat16 on cpu, got {query.dtype} on {query.device}")
    families = layout.families
    arrays = (layout.start, layout.length, layout.parent, *families)
    names = ("start", "length", "parent", "family_parent", "family_first", "members", "tree_first")
    return _Problem(
        heads=query.shape[1],
        kv_heads=key.shape[1],
        width=query.shape[2],
        bfloat16=query.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        amx=query.dtype == torch.bfloat16 and has_matrix_tiles(),
        families=len(families.parent),
        trees=len(families.tree_first) - 1,
        scale=scale,
        **{name: array.data_ptr() for name, array in zip(names, arrays, strict=True)},
    )


def _call(name: str, problem: ctypes.Structure, **tensors: Tensor) -> None:
    library, reason = _library()
    if library is None:
        raise UserError(f"attention: backend cpu_tree is not available ({reason}); choose cpu_flash")
    for field, tensor in tensors.items():
        setattr(problem, field, tensor.data_ptr())
    if getattr(library, name)(ctypes.byref(problem)):
        raise MemoryError(f"{name}: out of memory")


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        library = ctypes.CDLL(str(_built()))
        for name in _WITHOUT_RESULT:
            getattr(library, name).restype = None
        return library, None
    except (OSError, UserError, subprocess.SubprocessError) as error:
        detail = error.stderr.strip().splitlines() if isinstance(error, subprocess.CalledProcessError) else []
        reason = detail[0] if detail else str(error)
        _log.warning("no compiled kernels, torch's own are used: %s", reason)
        return None, reason


def _built() -> Path:
    """The shared library of these sources on this machine, compiled if it is not there yet."""
    sources = sorted(_SOURCES.glob("*.[ch]"))
    command = [*shlex.split(os.environ.get("CC", "cc")), *_FLAGS.split()]
    contents = [path.read_bytes() for path in sources]
    identity = hashlib.sha256(b"\0".join([*contents, shlex.join(command).encode(), _processor()])).hexdigest()[:16]
    path = cache_folder() / "kernels" / f"rubric-rm-{identity}.so"
    if not path.exists():
        with atomic_path(path) as temporary:
            subprocess.run(
                [*command, *(str(one) for one in sources if one.suffix == ".c"), "-o", str(temporary), "-lm"],
                check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS,
            )  # fmt: skip
    return path


def _processor() -> bytes:
    """What -march=native looks at: a cache folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor().encode()
    return "\n".join(
        sorted({x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))})
    ).encode()
