"""Put one-pass kernels in the place of a decoder's elementwise chains, on CPU, where they compute the same.

On CPU, RMS normalisation and gated SiLU are chains of small operations, each a pass over memory. `fuse` replaces the
``forward`` of the modules it recognises by a C kernel (`rm.native`), after it has tried both on random numbers: what
does not compute the same is left alone. No class is changed, and nothing happens on other devices or dtypes.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rm import native

_TOLERANCE = 2e-5  # of the trial in float32, absolute and relative


def fuse(backbone: nn.Module) -> int:
    """Fuse what can be fused in ``backbone``; returns how many modules were. Does nothing without a C compiler."""
    if native.reason_missing():
        return 0
    return sum(_replace(module) for module in list(backbone.modules()))


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
        same = torch.allclose(fused(trial), plain(trial), atol=_TOLERANCE, rtol=_TOLERANCE)
        module.to(dtype)
    if same:
        module.forward = fused
    return same
