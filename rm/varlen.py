"""Tree attention from variable-length flash kernels, for CUDA: one call for each depth of the tree, merged exactly.

Every token attends causally to its own segment, and fully to each ancestor. That is one causal call over all segments
and, for every depth above the leaves, one call in which the descendants of each segment there read that segment.
Partial results merge by log-sum-exp; the backward pass gives every call the *merged* output and log-sum-exp, which is
all that flash attention's backward needs to be exact (Dao et al. 2022, arXiv:2205.14135, Algorithm 4: P = exp(S - lse),
D = rowsum(dO * O)). The number of kernel calls does not grow with the number of segments.

Backends: `flash_attention_2` (the flash-attn package) and `torch_varlen` (the flash kernel inside torch). Neither runs
on CPU; tests put a reference with the same signature in their place.
"""

import functools
import importlib.util
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rm.layout import TreeLayout, VarlenCall

_ALIGNMENT = 8  # of the head width, in elements: what the kernels load at once
_AMPERE = (8, 0)  # compute capability the kernels need
VARLEN_BACKENDS = ("flash_attention_2", "torch_varlen")


class Kernel(Protocol):
    """Attention of ragged sequences: queries (Tq, H, D) of each read keys and values (Tk, G, D) of the same."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, call: VarlenCall, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output (Tq, H, D), log-sum-exp (H, Tq) float32."""
        ...

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
        call: VarlenCall, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of query, key and value."""
        ...


class FlashAttention2:
    """`flash_attn` 2.8's varlen kernel."""

    def forward(self, query, key, value, call, scale):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, lse, *_ = _flash_attn_varlen_forward(
            query, key, value, call.query_first, call.key_first, call.longest_query, call.longest_key,
            0.0, scale, call.causal, -1, -1, 0.0, None, False,
        )  # fmt: skip
        return out, lse

    def backward(self, grad, query, key, value, out, lse, call, scale):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        grads = tuple(torch.empty_like(x) for x in (query, key, value))
        _flash_attn_varlen_backward(
            grad, query, key, value, out, lse, *grads, call.query_first, call.key_first,
            call.longest_query, call.longest_key, 0.0, scale, call.causal, -1, -1, 0.0, None, False, None,
        )  # fmt: skip
        return grads


class TorchVarlen:
    """The flash kernel that comes with torch."""

    def forward(self, query, key, value, call, scale):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, call.query_first, call.key_first, call.longest_query, call.longest_key,
            0.0, call.causal, False, scale=scale,
        )  # fmt: skip
        return out, lse

    def backward(self, grad, query, key, value, out, lse, call, scale):
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
        unused = torch.empty(0, device=query.device)
        return torch.ops.aten._flash_attention_backward(
            grad, query, key, value, out, lse, call.query_first, call.key_first, call.longest_query, call.longest_key,
            0.0, call.causal, no_dropout, unused, scale=scale,
        )  # fmt: skip


KERNELS: dict[str, Kernel] = {"flash_attention_2": FlashAttention2(), "torch_varlen": TorchVarlen()}


def best_varlen(device: torch.device) -> str | None:
    """The fastest of `VARLEN_BACKENDS` that ``device`` can run; None if it can run neither."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _AMPERE:
        return None
    return "flash_attention_2" if _has_flash_attn() else "torch_varlen"


@functools.cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def varlen_attention(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, layout: TreeLayout, scale: float, kernel: Kernel
) -> Tensor:
    """Attention of packed tokens along their tree, (T, H, D), for any width D (kernels want multiples of 8)."""
    width = query_THD.shape[-1]
    missing = -width % _ALIGNMENT
    inputs = [F.pad(x, (0, missing)) if missing else x for x in (query_THD, key_TGD, value_TGD)]
    return _VarlenTree.apply(*inputs, layout, scale, kernel)[..., :width]


class _Rows(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor


def _rows(call: VarlenCall, query: Tensor, key: Tensor, value: Tensor) -> _Rows:
    if call.queries is None or call.keys is None:
        return _Rows(query, key, value)
    return _Rows(query[call.queries], key[call.keys], value[call.keys])


class _VarlenTree(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float, kernel: Kernel
    ) -> Tensor:
        query, key, value = (x.contiguous() for x in (query, key, value))
        first, *others = layout.varlen_calls
        own, own_lse = kernel.forward(query, key, value, first, scale)
        out, lse = own.float(), own_lse.T.contiguous()
        for call in others:
            part, part_lse = kernel.forward(*_rows(call, query, key, value), call, scale)
            before, part_lse = lse[call.queries], part_lse.T
            merged = torch.logaddexp(before, part_lse)
            kept = out[call.queries] * (before - merged).exp()[..., None]
            out[call.queries] = kept + part * (part_lse - merged).exp()[..., None]
            lse[call.queries] = merged
        result = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, result, lse)
        ctx.layout, ctx.scale, ctx.kernel = layout, scale, kernel
        return result

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        totals = [torch.zeros_like(x, dtype=torch.float32) for x in (query, key, value)]
        for call in ctx.layout.varlen_calls:
            rows = _rows(call, query, key, value)
            mine = (grad, out, lse) if call.queries is None else (x[call.queries] for x in (grad, out, lse))
            part_grad, part_out, part_lse = mine
            parts = ctx.kernel.backward(part_grad, *rows, part_out, part_lse.T.contiguous(), call, ctx.scale)
            for total, part, places in zip(totals, parts, (call.queries, call.keys, call.keys), strict=True):
                if places is None:
                    total += part
                else:
                    total[places] += part  # a place is met once in a call: segments of one depth do not overlap
        grads = (total.to(x.dtype) for total, x in zip(totals, (query, key, value), strict=True))
        return *grads, None, None, None
