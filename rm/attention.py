"""Attention over a rubric tree, plugged into transformers' decoders by name. Owns the kernels, not the layout.

Backends: `cpu_tree` (our C kernel, `rm.native`, where a C compiler is at hand), `cpu_flash` (torch's CPU flash
kernel, one call for each group of blocks of the layout, with the kernel's own backward) and `sdpa` (one dense mask over
the whole row: the reference).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from rm import native
from rm.layout import AttentionGroup, TreeLayout

BACKENDS = ("cpu_tree", "cpu_flash", "sdpa")
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux")  # forward arguments that mean: not plain causal attention


def choose_backend(name: str, device: torch.device | str) -> str:
    """``name``, or for 'auto' the fastest backend ``device`` has. Raises ValueError on an unknown name."""
    if name == "auto":
        if torch.device(device).type != "cpu":
            return "sdpa"
        return "cpu_flash" if native.reason_missing() else "cpu_tree"
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
    if backend == "cpu_tree":
        return _NativeTree.apply(query_THD, key_TGD, value_TGD, layout, scale)
    # in float32, because torch's bfloat16 CPU backward is 10 to 20 times slower (benchmarks/LOG.md)
    out = _FlashTree.apply(query_THD.float(), key_TGD.float(), value_TGD.float(), layout, scale)
    return out.to(query_THD.dtype)


def _dense_attention(query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, layout: TreeLayout, scale: float) -> Tensor:
    query, key, value = (x.transpose(0, 1)[None] for x in (query_THD, key_TGD, value_TGD))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=layout.mask(), scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


class _NativeTree(torch.autograd.Function):
    """The C kernel with its own backward; it reads and writes the inputs' dtype and computes in float32."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float) -> Tensor:
        out, lse = native.forward(query, key, value, layout, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        return *native.backward(grad, query, key, value, out, lse, ctx.layout, ctx.scale), None, None


class _FlashTree(torch.autograd.Function):
    """Flash attention block by block. Tensors are (T, heads, D); the kernel wants (n, heads, tokens, D)."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float) -> Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        kept = []
        for group in layout.groups:
            part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *_gather(query, key, value, group), attn_mask=group.bias, scale=scale
            )
            out[group.queries[group.valid]] = part.transpose(1, 2)[group.valid]
            kept += [part, lse]
        ctx.save_for_backward(query, key, value, *kept)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
        for place, group in enumerate(ctx.layout.groups):
            part, lse = kept[2 * place : 2 * place + 2]
            # padded queries send no gradient, so they add nothing to any key
            grad_part = (grad[group.queries] * group.valid[:, :, None, None]).transpose(1, 2)
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_part, *_gather(query, key, value, group), part, lse, 0.0, False,
                attn_mask=group.bias, scale=ctx.scale,
            )  # fmt: skip
            part_query, part_key, part_value = (x.transpose(1, 2) for x in parts)
            grad_query[group.queries[group.valid]] = part_query[group.valid]
            keys = group.keys.flatten()
            grad_key.index_add_(0, keys, part_key.flatten(0, 1))  # a prompt is a key of many blocks
            grad_value.index_add_(0, keys, part_value.flatten(0, 1))
        return grad_query, grad_key, grad_value, None, None


def _gather(query: Tensor, key: Tensor, value: Tensor, group: AttentionGroup) -> tuple[Tensor, Tensor, Tensor]:
    rows = (query[group.queries], key[group.keys], value[group.keys])
    return tuple(x.transpose(1, 2) for x in rows)  # type: ignore[return-value]


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
