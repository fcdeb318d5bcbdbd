"""Attention over a rubric tree, plugged into transformers' decoders by name. Owns the kernels, not the layout.

A tree needs three kinds of flash calls: causal within each segment, descendants over their prompt, criteria
over their response. Their partial results merge by log-sum-exp; the backward pass gives every call the *merged*
output and log-sum-exp, which is all flash attention's backward needs to be exact (Dao et al. 2022,
arXiv:2205.14135, Algorithm 4: P = exp(S - lse), D = rowsum(dO * O)).

Backends: `cpu_flash` (torch's CPU flash kernel) and `sdpa` (dense mask: the reference).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from rm.layout import CausalGroup, TreeLayout

BACKENDS = ("cpu_flash", "sdpa")
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux")  # forward arguments that mean: not plain causal attention


def choose_backend(name: str, device: torch.device | str) -> str:
    """``name``, or for 'auto' the fastest backend ``device`` has. Raises ValueError on an unknown name."""
    if name == "auto":
        return "cpu_flash" if torch.device(device).type == "cpu" else "sdpa"
    if name not in BACKENDS:
        raise ValueError(f"attention: unknown backend {name!r}; choose one of auto, {', '.join(BACKENDS)}")
    return name


def attention_name(backend: str) -> str:
    """The ``attn_implementation`` that makes a transformers model use ``backend``."""
    # transformers takes any name with "flash" in it for one of its own kernels
    return "rubric_tree_" + backend.replace("flash", "fa")


def tree_attention(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, layout: TreeLayout, scale: float, backend: str
) -> Tensor:
    """Attention of packed tokens along their tree, (T, H, D).

    G key/value heads, H a multiple of G. ``backend`` as in `BACKENDS`; all give the same result.
    """
    if backend == "sdpa":
        return _dense_attention(query_THD, key_TGD, value_TGD, layout, scale)
    # in float32, because torch's bfloat16 CPU backward is 10 to 20 times slower (benchmarks/LOG.md)
    out = _FlashTree.apply(query_THD.float(), key_TGD.float(), value_TGD.float(), layout, scale)
    return out.to(query_THD.dtype)


def _dense_attention(query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, layout: TreeLayout, scale: float) -> Tensor:
    query, key, value = (x.transpose(0, 1)[None] for x in (query_THD, key_TGD, value_TGD))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=layout.mask(), scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """One kernel call on (s, L, H, D) tensors: output (s, L, H, D) and log-sum-exp (s, L, H)."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), 0.0, causal, scale=scale
    )
    return out.transpose(1, 2), lse.transpose(1, 2)


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, ...]:
    """The kernel's backward on (s, L, H, D) tensors, with the merged output and log-sum-exp."""
    args = (x.transpose(1, 2) for x in (grad, query, key, value, out, lse))
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*args, 0.0, causal, scale=scale)
    return tuple(x.transpose(1, 2) for x in grads)


def _merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Fold a partial attention result into ``out`` (L, H, D) and ``lse`` (L, H), in place."""
    merged = torch.logaddexp(lse, part_lse)
    out.mul_((lse - merged).exp_()[..., None]).addcmul_(part_out, (part_lse - merged).exp_()[..., None])
    lse.copy_(merged)


class _FlashTree(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float) -> Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = out.new_empty(query.shape[:2])
        for group in layout.causal:
            rows = group.index[group.valid]
            part_out, part_lse = _flash(query[group.index], key[group.index], value[group.index], True, scale)
            out[rows] = part_out[group.valid]
            lse[rows] = part_lse[group.valid]
        for block in layout.cross:
            mine, theirs = slice(block.start, block.stop), slice(block.key_start, block.key_stop)
            part_out, part_lse = _flash(query[None, mine], key[None, theirs], value[None, theirs], False, scale)
            _merge(out[mine], lse[mine], part_out[0], part_lse[0])
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        layout: TreeLayout = ctx.layout
        grad = grad.contiguous()
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
        for group in layout.causal:
            rows = group.index[group.valid]
            parts = _flash_backward(
                _without_padding(grad, group), query[group.index], key[group.index], value[group.index],
                out[group.index], lse[group.index], True, ctx.scale,
            )  # fmt: skip
            for total, part in zip((grad_query, grad_key, grad_value), parts, strict=True):
                total[rows] = part[group.valid]
        for block in layout.cross:
            mine, theirs = slice(block.start, block.stop), slice(block.key_start, block.key_stop)
            part_query, part_key, part_value = _flash_backward(
                grad[None, mine], query[None, mine], key[None, theirs], value[None, theirs],
                out[None, mine], lse[None, mine], False, ctx.scale,
            )  # fmt: skip
            grad_query[mine] += part_query[0]
            grad_key[theirs] += part_key[0]
            grad_value[theirs] += part_value[0]
        return grad_query, grad_key, grad_value, None, None


def _without_padding(grad: Tensor, group: CausalGroup) -> Tensor:
    """Rows of ``grad`` for a group; padding sends no gradient, so it adds nothing to any other."""
    return grad[group.index] * group.valid[:, :, None, None]


def _forward_of(backend: str):
    def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, tree_layout=None, **kwargs):
        if tree_layout is None:
            raise ValueError("rubric-tree attention: called without tree_layout; use RubricRewardModel")
        odd = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
        if odd or dropout:
            raise ValueError(
                f"rubric-tree attention: {type(module).__name__} asks for {', '.join(odd) or 'dropout'}, "
                "which a tree cannot honour exactly; choose a backbone with plain causal attention"
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        return tree_attention(query, key, value, tree_layout, scale, backend)[None], None

    return forward


def register() -> None:
    """Make every backend known to transformers, with a mask function that builds no mask."""
    for backend in BACKENDS:
        AttentionInterface.register(attention_name(backend), _forward_of(backend))
        AttentionMaskInterface.register(attention_name(backend), lambda *args, **kwargs: None)


register()
