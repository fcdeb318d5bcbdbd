"""Models under adapters: what is merged computes the same, adapters stand on each other, and faults are told."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from rm.backbone import adapter_base, load_causal_lm, load_tokenizer
from rm.lora import attach_lora
from rubric_data.errors import UserError


def save_adapter(base, folder, seed):
    """A random adapter on ``base`` in ``folder``, as an RL run leaves it but for the tokenizer; the folder's name."""
    model = load_causal_lm(base)
    adapted = attach_lora(model, model.get_decoder().layers, rank=2, alpha=8, task_type="CAUSAL_LM")
    chance = torch.Generator().manual_seed(seed)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1, generator=chance)
    adapted.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def two(tmp_path, tiny_backbone):
    """The folders of an adapter on the tiny backbone, and of one on top of that."""
    first = save_adapter(tiny_backbone, tmp_path / "first", 1)
    return first, save_adapter(first, tmp_path / "second", 2)


@torch.no_grad()
def test_adapters_on_each_other_are_merged_down_to_the_backbone(two, tiny_backbone):
    first, second = two
    tokens = torch.arange(4, 12)[None]
    start, one, both = (load_causal_lm(name)(tokens).logits for name in (tiny_backbone, first, second))
    apart = PeftModel.from_pretrained(load_causal_lm(tiny_backbone), first)
    torch.testing.assert_close(one, apart(tokens).logits, rtol=1e-4, atol=1e-4)
    assert (one - start).abs().max() > 0.1 < (both - one).abs().max()

    apart = PeftModel.from_pretrained(load_causal_lm(first), second)
    torch.testing.assert_close(both, apart(tokens).logits, rtol=1e-4, atol=1e-4)
    with apart.disable_adapter():  # the reference of what is trained on top is what was merged below
        torch.testing.assert_close(apart(tokens).logits, one)
    assert adapter_base(second) == str(Path(first).resolve()) and adapter_base(tiny_backbone) is None

    half = load_causal_lm(second, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    rounded = load_causal_lm(second).bfloat16().state_dict()
    for name, weight in half.state_dict().items():  # two adapters, each rounded to 8 bits
        torch.testing.assert_close(weight, rounded[name], rtol=2**-6, atol=2**-9)


def test_an_adapter_without_a_tokenizer_has_its_base_s(two, tiny_backbone):
    assert load_tokenizer(two[1]).get_vocab() == load_tokenizer(tiny_backbone).get_vocab()


def test_a_base_that_cannot_be_had_is_told(two):
    path = Path(two[1], "adapter_config.json")
    config = json.loads(path.read_text())

    def rewrite(base):
        path.write_text(json.dumps(config | {"base_model_name_or_path": base}))

    rewrite("/no/such/folder")
    with pytest.raises(UserError, match="was trained on /no/such/folder, which is gone"):
        load_causal_lm(two[1])
    rewrite(None)
    with pytest.raises(UserError, match="does not say what the adapter was trained on"):
        load_tokenizer(two[1])
    rewrite(two[0])
    Path(two[1], "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be put on its base"):
        load_causal_lm(two[1])


@torch.no_grad()
def test_the_output_layer_reads_a_slice_in_one_piece(tiny_backbone):
    model = load_causal_lm(tiny_backbone)  # else torch copies a frozen weight for each sequence of the batch
    tokens = torch.arange(4, 28).reshape(4, 6)
    whole = model(tokens).logits
    read = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    last = model(tokens, logits_to_keep=1).logits
    assert read[0].shape[:2] == (4, 1) and read[0].is_contiguous()
    torch.testing.assert_close(last, whole[:, -1:])
