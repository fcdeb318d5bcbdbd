import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rm.attention import BACKENDS, choose_backend, tree_attention
from rm.layout import pack
from tests.rm.trees import forests

HEADS, GROUPS, WIDTH = 4, 2, 8


def _attend(forest, backend, seed):
    layout = pack(forest)[2]
    tokens = len(layout.segment)
    generator = torch.Generator().manual_seed(seed)
    query, key, value, grad = (
        torch.randn(tokens, heads, WIDTH, generator=generator, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS, HEADS)
    )
    out = tree_attention(query, key, value, layout, WIDTH**-0.5, backend)
    out.backward(grad.detach())
    return out, query.grad, key.grad, value.grad


@settings(deadline=None, max_examples=40)
@given(forests, st.integers(0, 1000))
def test_backends_agree_forward_and_backward(forest, seed):
    reference = _attend(forest, "sdpa", seed)
    for backend in set(BACKENDS) - {"sdpa"}:
        for got, want in zip(_attend(forest, backend, seed), reference, strict=True):
            torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_unknown_backend_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown backend 'flush'; choose one of auto, cpu_flash, sdpa"):
        choose_backend("flush", "cpu")
