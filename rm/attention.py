"""Attention over a rubric tree, plugged into transformers' decoders by name. Owns the choice of kernel, not the layout.

Backends, fastest first where they run:

- `flash_attention_2`, `torch_varlen`: ragged flash kernels on CUDA (`rm.varlen`).
- `cpu_tree`: our C kernel (`rm.native`), where a C compiler is at hand.
- `cpu_flash`: torch's CPU flash kernel and its backward, one call for each group of blocks of the layout.
- `sdpa`: one dense mask over the whole row, anywhere: the reference, and the only one for float32 on CUDA.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from rm import native
from rm.layout import AttentionGroup, TreeLayout
from rm.varlen import KERNELS, VARLEN_BACKENDS, best_varlen, varlen_attention
from rubric_data.errors import UserError

NAME = "rubric_tree"  # the ``attn_implementation`` of every backbone; which kernel is decided at each call
BACKENDS = (*VARLEN_BACKENDS, "cpu_tree", "cpu_flash", "sdpa")


def check_backend(name: str) -> None:
    """Raise UserError if ``name`` is neither 'auto' nor one of `BACKENDS`."""
    if name != "auto" and name not in BACKENDS:
        raise UserError(f"attention: unknown backend {name!r}; choose one of auto, {', '.join(BACKENDS)}")


def choose_backend(name: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """``name``, or for 'auto' the fastest backend that ``device`` has for ``dtype``.

    Raises UserError on an unknown name, and where ``name`` cannot run on ``device`` or in ``dtype``.
    """
    check_backend(name)
    device = torch.device(device)
    half = dtype in (torch.float16, torch.bfloat16)
    if name == "auto":
        if device.type == "cpu":
            return "cpu_flash" if native.reason_missing() or dtype == torch.float16 else "cpu_tree"
        return (best_varlen(device) if half else None) or "sdpa"
    if name in VARLEN_BACKENDS and (device.type != "cuda" or not half):
        raise UserError(
            f"attention: {name} computes in float16 or bfloat16 on CUDA, got {dtype} on {device}; choose auto"
        )
    if name.startswith("cpu_") and device.type != "cpu":
        raise UserError(f"attention: {name} runs on CPU, got {device}; choose auto")
    return name


def tree_attention(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, layout: TreeLayout, scale: float, backend: str
) -> Tensor:
    """Attention of packed tokens along their tree, (T, H, D).

    G key/value heads, H a multiple of G. ``backend`` as in `BACKENDS`; all give the same result.
    """
    if backend == "sdpa":
        return _dense_attention(query_THD, key_TGD, value_TGD, layout, scale)
    if backend in VARLEN_BACKENDS:
        return varlen_attention(query_THD, key_TGD, value_TGD, layout, scale, KERNELS[backend])
    if backend == "cpu_tree":
        return _NativeTree.apply(query_THD, key_TGD, value_TGD, layout, scale)
    # in float32, because torch's bfloat16 CPU backward is up to 20 times slower (benchmarks/LOG.md)
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


def _forward(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    tree_layout=None,
    tree_backend="auto",
    tree_reading=None,
    **kwargs,
):
    if tree_layout is None:
        raise ValueError("rubric-tree attention: called without tree_layout; use RubricRewardModel")
    _check_plain(type(module).__name__, tree_layout, dropout, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    backend = choose_backend(tree_backend, query.device, query.dtype)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if tree_reading is None:
        return tree_attention(query, key, value, tree_layout, scale, backend)[None], None
    query, key, value = tree_reading.whole(module.layer_idx, query, key, value)
    out = tree_attention(query, key, value, tree_reading.layout, scale, backend)
    return tree_reading.wanted(out)[None], None


def _check_plain(layer: str, layout: TreeLayout, dropout: float, asked: dict) -> None:
    """Raise ValueError if a layer asks for attention that a tree would not honour exactly."""
    window = asked.get("sliding_window")
    if window is not None and layout.longest_path > window:
        raise ValueError(
            f"rubric-tree attention: {layer} looks back {window} tokens only, and a path of this batch has "
            f"{layout.longest_path}; set max_length to {window} or choose a backbone without sliding window"
        )
    odd = [name for name in ("softcap", "s_aux", "attention_bias", "position_bias") if asked.get(name) is not None]
    if dropout:
        odd.append("dropout")
    if odd:
        raise ValueError(
            f"rubric-tree attention: {layer} asks for {', '.join(odd)}, which a tree does not honour; "
            "choose a backbone with plain causal attention"
        )


def register() -> None:
    """Make tree attention known to transformers, with a mask function that builds no mask."""
    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


register()
