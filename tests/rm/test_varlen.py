"""The CUDA backends, with a reference in the place of their kernels: same signature, same shapes, float32 on CPU."""

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rm.attention import tree_attention
from rm.layout import Branch, Tree, pack
from rm.varlen import KERNELS, varlen_attention
from tests.rm.test_attention import LONG
from tests.rm.trees import forests


def _scores(query, key, query_first, key_first, scale, causal):
    """Scores (H, Tq, Tk) with -inf between different sequences and at future keys; keys repeated for shared heads."""
    group = query.shape[1] // key.shape[1]
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(group, 1)) * scale
    of_query = torch.bucketize(torch.arange(len(query)), query_first[1:].long(), right=True)
    of_key = torch.bucketize(torch.arange(len(key)), key_first[1:].long(), right=True)
    allowed = of_query[:, None] == of_key[None, :]
    if causal:
        allowed &= torch.arange(len(query))[:, None] >= torch.arange(len(key))[None, :]
    return scores.masked_fill(~allowed, -torch.inf)


def _check(query, key, query_first, key_first, longest_query, longest_key):
    for rows, first, longest in ((query, query_first, longest_query), (key, key_first, longest_key)):
        assert first.dtype == torch.int32 and first[0] == 0 and first[-1] == len(rows)
        assert first.diff().max() == longest and first.diff().min() > 0
        assert rows.shape[-1] % 8 == 0 and rows.stride(-1) == 1


def _forward(query, key, value, query_first, key_first, longest_query, longest_key, causal, scale):
    _check(query, key, query_first, key_first, longest_query, longest_key)
    scores = _scores(query, key, query_first, key_first, scale, causal)
    group = query.shape[1] // key.shape[1]
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.repeat_interleave(group, 1))
    return out, scores.logsumexp(-1)


def _backward(grad, query, key, value, out, lse, query_first, key_first, longest_query, longest_key, causal, scale):
    _check(query, key, query_first, key_first, longest_query, longest_key)
    assert lse.shape == (query.shape[1], len(query)) and lse.is_contiguous()
    group = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (key, value))
    probs = (_scores(query, key, query_first, key_first, scale, causal) - lse[..., None]).exp()
    slope = torch.einsum("qhd,khd->hqk", grad, values) - (grad * out).sum(-1).T[..., None]
    slope = probs * slope * scale
    grad_key = torch.einsum("hqk,qhd->khd", slope, query)
    grad_value = torch.einsum("hqk,qhd->khd", probs, grad)
    heads = (len(key), key.shape[1], group, -1)
    return torch.einsum("hqk,khd->qhd", slope, keys), grad_key.view(heads).sum(2), grad_value.view(heads).sum(2)


def _flash_attn_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
):  # fmt: skip
    assert dropout_p == softcap == 0 and window_size_left == window_size_right == -1 and alibi_slopes is None
    out, lse = _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale)
    return out, lse, torch.empty(0), torch.empty(2)


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
    rng_state=None, zero_tensors=False,
):  # fmt: skip
    assert dropout_p == softcap == 0 and window_size_left == window_size_right == -1 and alibi_slopes is None
    grads = _backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale
    )
    for target, grad in zip((dq, dk, dv), grads, strict=True):
        target.copy_(grad)
    return torch.empty(0)


def _aten_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None, **_
):
    out, lse = _forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, is_causal, scale)
    return out, lse, torch.empty(2), torch.empty(0), torch.empty(0)


def _aten_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    rng_state, unused, *, scale=None, **_,
):  # fmt: skip
    return _backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, is_causal, scale)


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """The library's functions under their own names, and torch's operators on CPU, checked against their schemas."""
    package, module = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.flash_attn_interface")
    module._flash_attn_varlen_forward = _flash_attn_varlen_forward
    module._flash_attn_varlen_backward = _flash_attn_varlen_backward
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _aten_forward, "CPU")
    library.impl("_flash_attention_backward", _aten_backward, "CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", package)
        patch.setitem(sys.modules, "flash_attn.flash_attn_interface", module)
        yield
    library._destroy()


def _attend(forest, attend, width=8):
    layout = pack(forest)[2]
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(len(layout.segment), heads, width, generator=generator).requires_grad_() for heads in (4, 2, 2, 4)
    )
    out = attend(query, key, value, layout, width**-0.5)
    out.backward(grad.detach())
    return out, query.grad, key.grad, value.grad


def _reference(*args):
    return tree_attention(*args, "sdpa")


@pytest.mark.parametrize("kernel", KERNELS)
@settings(deadline=None, max_examples=25)
@given(forest=forests, width=st.sampled_from([8, 5]))
def test_merged_calls_equal_the_dense_reference_forward_and_backward(kernel, forest, width):
    got = _attend(forest, lambda *args: varlen_attention(*args, KERNELS[kernel]), width)
    for mine, want in zip(got, _attend(forest, _reference, width), strict=True):
        torch.testing.assert_close(mine, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_long_trees_take_three_calls(kernel, monkeypatch):
    calls = []
    one = KERNELS[kernel]
    forward = type(one).forward
    monkeypatch.setattr(type(one), "forward", lambda self, *args: calls.append(args[3]) or forward(self, *args))
    got = _attend(LONG, lambda *args: varlen_attention(*args, one))
    for mine, want in zip(got, _attend(LONG, _reference), strict=True):
        torch.testing.assert_close(mine, want, atol=2e-5, rtol=2e-5)
    assert [call.causal for call in calls] == [True, False, False]


def test_calls_of_the_documented_example():
    # two responses to one prompt; the first has two criteria, the second one (the picture in rm.layout)
    tree = Tree([1, 1, 1, 1], [Branch([2, 2, 2], [[3, 3], [4, 4]]), Branch([5, 5, 5, 5], [[6, 6, 6]])])
    own, prompts, responses = pack([tree])[2].varlen_calls
    assert own.query_first.tolist() == [0, 4, 7, 9, 11, 15, 18] and own.queries is None
    assert prompts.queries.tolist() == list(range(4, 18)) and prompts.keys.tolist() == [0, 1, 2, 3]
    assert prompts.query_first.tolist() == [0, 14] and prompts.key_first.tolist() == [0, 4]
    assert responses.queries.tolist() == [7, 8, 9, 10, 15, 16, 17]
    assert responses.keys.tolist() == [4, 5, 6, 11, 12, 13, 14]
    assert responses.query_first.tolist() == [0, 4, 7] and responses.key_first.tolist() == [0, 3, 7]
    assert (responses.longest_query, responses.longest_key) == (4, 4)
