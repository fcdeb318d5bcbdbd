"""Put one-pass kernels in the place of a decoder's elementwise chains, on CPU, where they compute the same.

On CPU, RMS normalisation, gated SiLU and rotary positions are chains of small operations, each a pass over memory.
`fuse` replaces the ``forward`` of the modules it recognises, after it has tried the C kernel (`rm.native`) and the
original on random numbers: what does not compute the same is left alone. No class is changed, and nothing happens on
other devices or dtypes.
"""

import functools
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rm import native

_TOLERANCE = 2e-5  # of the trial in float32, against the largest number
_ROTARY = "apply_rotary_pos_emb"  # what transformers' decoders call their rotary positions


def fuse(backbone: nn.Module) -> int:
    """Fuse what can be fused in ``backbone``; returns how many modules were. Does nothing without a C compiler."""
    if native.reason_missing():
        return 0
    return sum(_replace(module) or _replace_rotary(module) for module in list(backbone.modules()))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        out, inverse = native.rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return native.rms_norm_backward(grad, *ctx.saved_tensors), None, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return native.silu_mul(gate, up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return native.silu_mul_backward(grad, *ctx.saved_tensors)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return native.rotate(x, cosine, sine)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return native.rotate(grad, *ctx.saved_tensors, back=True), None, None


def _norm_forward(module: Any, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    weight = module.weight
    trained = weight.requires_grad and torch.is_grad_enabled()  # the kernel has no gradient for the weight
    if trained or weight.dtype != x.dtype or not native.supports(x):
        return plain(x)
    return _RmsNorm.apply(x, weight, module.variance_epsilon)


def _gated_forward(module: Any, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not native.supports(x):
        return plain(x)
    return module.down_proj(_SiluMul.apply(module.gate_proj(x), module.up_proj(x)))


def _replace(module: Any) -> bool:
    forward: Callable[[Any, Callable[[Tensor], Tensor], Tensor], Tensor]
    if isinstance(getattr(module, "weight", None), nn.Parameter) and hasattr(module, "variance_epsilon"):
        forward, width = _norm_forward, module.weight.numel()
    elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        forward, width = _gated_forward, module.gate_proj.in_features
    else:
        return False
    plain = module.forward
    fused = functools.partial(forward, module, plain)  # copied with its module, which a closure would not be
    dtype = next(module.parameters()).dtype
    trial = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        module.float()  # the trial is about the formula, not about rounding
        same = _same(fused(trial), plain(trial))
        module.to(dtype)
    if same:
        module.forward = fused
    return same


def _replace_rotary(module: Any) -> bool:
    """Let this module's ``forward`` find our rotary positions under the name by which it calls the library's."""
    plain = module.forward
    function: Any = getattr(plain, "__func__", None)
    rotary = getattr(function, "__globals__", {}).get(_ROTARY)
    if rotary is None or _ROTARY not in function.__code__.co_names:
        return False
    width = getattr(module, "head_dim", None)
    fused = functools.partial(_rotary, rotary)
    if not isinstance(width, int) or not _same_rotary(fused, rotary, width):
        return False
    names = {**function.__globals__, _ROTARY: fused}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    module.forward = MethodType(copy, module)
    return True


def _rotary(plain: Callable[..., Any], query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any):
    """Both (1, heads, T, D), turned by ``cos`` and ``sin`` (1, T, D); anything else is left to ``plain``."""
    one = all(x.dtype == query.dtype and x.shape[0] == 1 and x.shape[-1] == query.shape[-1] for x in (key, cos, sin))
    if not one or query.shape[0] != 1 or cos.dim() != 3 or args or kwargs or not native.supports(query):
        return plain(query, key, cos, sin, *args, **kwargs)
    return tuple(_Rotate.apply(x[0].transpose(0, 1), cos[0], sin[0]).transpose(0, 1)[None] for x in (query, key))


def _same_rotary(fused: Callable[..., Any], plain: Callable[..., Any], width: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 3, width, generator=generator) for heads in (2, 1))
    cos, sin = (torch.randn(1, 3, width, generator=generator) for _ in range(2))
    try:
        return all(map(_same, fused(query, key, cos, sin), plain(query, key, cos, sin)))
    except (RuntimeError, TypeError, ValueError):  # another function of the same name
        return False


def _same(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    return bool((first - second).abs().max() <= _TOLERANCE * second.abs().max())
