import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from rm import native
from rm.fused import fuse


def _norm(x, weight, epsilon):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()


@pytest.mark.parametrize("width", [5, 64, 100])
def test_kernels_equal_their_formulas_forward_and_backward(width):
    generator = torch.Generator().manual_seed(0)
    x, gate, up, grad = (torch.randn(2, 37, width, generator=generator, requires_grad=True) for _ in range(4))
    weight = torch.rand(width, generator=generator) + 0.5
    out, inverse = native.rms_norm(x.detach(), weight, 1e-5)
    want = _norm(x, weight, 1e-5)
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-5)
    want.backward(grad)
    torch.testing.assert_close(
        native.rms_norm_backward(grad, x.detach(), weight, inverse), x.grad, atol=2e-6, rtol=1e-5
    )
    wide = gate.detach() * 40  # where e^x would overflow or vanish
    torch.testing.assert_close(native.silu_mul(wide, up.detach()), F.silu(wide) * up, atol=1e-5, rtol=1e-5)
    (F.silu(gate) * up).backward(grad)
    for got, wanted in zip(
        native.silu_mul_backward(grad, gate.detach(), up.detach()), (gate.grad, up.grad), strict=True
    ):
        torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("width", [6, 64])
def test_rotary_positions_equal_the_librarys_forward_and_backward(width):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(1, 3, 37, width, generator=generator, requires_grad=True) for _ in range(2))
    cos, sin = (torch.randn(1, 37, width, generator=generator) for _ in range(2))
    want, _ = apply_rotary_pos_emb(x, x, cos, sin)
    want.backward(grad)
    rows, grad_rows = (y.detach()[0].transpose(0, 1) for y in (x, grad))
    torch.testing.assert_close(native.rotate(rows, cos[0], sin[0]).transpose(0, 1)[None], want)
    torch.testing.assert_close(native.rotate(grad_rows, cos[0], sin[0], back=True).transpose(0, 1)[None], x.grad)


def test_a_function_of_another_formula_is_left_alone(monkeypatch, tiny_backbone):
    decoder = AutoModel.from_pretrained(tiny_backbone, dtype=torch.float32).eval()
    monkeypatch.setattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", lambda q, k, *_: (q * 2, k))
    assert fuse(decoder) == 3 * decoder.config.num_hidden_layers + 1


def test_bfloat16_is_rounded_once():
    x = torch.randn(11, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.ones(48, dtype=torch.bfloat16)
    assert torch.equal(native.rms_norm(x, weight, 1e-6)[0], _norm(x.float(), weight.float(), 1e-6).bfloat16())
    close = (F.silu(x.float()) * x.float()).bfloat16()
    torch.testing.assert_close(native.silu_mul(x, x), close, atol=0, rtol=2**-7)


def test_a_decoder_computes_the_same_before_and_after_and_so_does_a_copy(tiny_backbone):
    decoder = AutoModel.from_pretrained(tiny_backbone, dtype=torch.float32).eval()
    ids = torch.arange(3, 40)[None]
    before = decoder(ids).last_hidden_state
    layers = decoder.config.num_hidden_layers
    assert fuse(decoder) == 4 * layers + 1  # two norms, rotary positions and a gated map a layer, and the last norm
    after = decoder(ids).last_hidden_state
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    twin = copy.deepcopy(decoder)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(ids).last_hidden_state, after, atol=1e-6, rtol=0)  # has weights of its own


def test_what_computes_something_else_is_left_alone():
    gemma = GemmaRMSNorm(8)  # multiplies by 1 + weight
    gemma.variance_epsilon = gemma.eps
    assert fuse(nn.Sequential(gemma)) == 0
    torch.testing.assert_close(gemma(torch.ones(1, 8)), torch.ones(1, 8))


def test_a_norm_that_is_trained_gets_its_gradient():
    norm = LlamaRMSNorm(8)
    assert fuse(nn.Sequential(norm)) == 1
    norm(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert norm.weight.grad is not None
