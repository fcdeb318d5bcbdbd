"""Tiny random decoders of other families: packed logits and gradients equal separate passes, or a clear refusal."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rm.layout import Branch, Tree, pack
from rm.model import RubricRewardModel
from tests.rm.trees import VOCABULARY, paths

SMALL = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
EXACT = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 64},
    "gemma3_text": {"head_dim": 16, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": None},
    "phi": {"partial_rotary_factor": 0.5},
}
FOREST = [
    Tree([3, 4, 5, 6], [Branch([7, 8, 9], [[10, 11], [12]]), Branch([13], [[14, 15, 16], [10, 11]])]),
    Tree([20, 21], [Branch([22, 23, 24, 25], [[26]])]),
]


def _saved(name, options, folder, tokenizer_from):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SMALL, **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("name", "options"), EXACT.items(), ids=EXACT)
def test_packed_equals_separate_passes(name, options, tmp_path, tiny_backbone):
    folder = _saved(name, options, tmp_path, tiny_backbone)
    model = RubricRewardModel.from_language_model(folder, max_length=64, dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    logits = model(*pack(FOREST))
    want = torch.cat([
        model.head(plain.base_model(torch.tensor([path]), use_cache=False).last_hidden_state[0, -1])
        for path in paths(FOREST)
    ])  # fmt: skip
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)
    weights = torch.linspace(-1, 1, len(want))
    (got,) = torch.autograd.grad((weights * logits).sum(), model.backbone.get_input_embeddings().weight)
    (wanted,) = torch.autograd.grad((weights * want).sum(), plain.get_input_embeddings().weight)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", EXACT)
def test_lora_reaches_every_linear_map_and_learns(name, tmp_path, tiny_backbone):
    folder = _saved(name, EXACT[name], tmp_path, tiny_backbone)
    model = RubricRewardModel.from_language_model(folder, max_length=64, dtype="float32")
    model.add_lora(2, 4, top_layers=1)
    model(*pack(FOREST)).sum().backward()
    grads = {key: p.grad for key, p in model.named_parameters() if "lora_B" in key}
    assert len(grads) >= 4 and all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())


@pytest.mark.parametrize("name", EXACT)
def test_checkpointing_changes_no_gradient(name, tmp_path, tiny_backbone):
    folder = _saved(name, EXACT[name], tmp_path, tiny_backbone)
    model = RubricRewardModel.from_language_model(folder, max_length=64, dtype="float32").train()
    model.add_lora(2, 4)
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = []
    for _ in range(2):
        model(*pack(FOREST)).sum().backward()
        grads.append([p.grad for p in trained])
        model.zero_grad()
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    assert any(type(m).__name__.endswith("DecoderLayer") and m.gradient_checkpointing for m in model.modules())
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mistral", {"sliding_window": 4}, "looks back 4 tokens only, and a path of this batch has 9; set max_length"),
        ("gemma2", {"head_dim": 16, "sliding_window": 64}, "asks for softcap, which a tree does not honour"),
    ],
)
def test_attention_that_is_not_plain_causal_is_refused(name, options, message, tmp_path, tiny_backbone):
    folder = _saved(name, options, tmp_path, tiny_backbone)
    model = RubricRewardModel.from_language_model(folder, max_length=64, dtype="float32")
    with pytest.raises(ValueError, match=message):
        model(*pack(FOREST))
