import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from rm.layout import Branch, Tree, pack
from rm.model import RubricRewardModel
from rubric_data.errors import UserError
from tests.rm.trees import forests, paths

BACKENDS = ("cpu_tree", "cpu_flash", "sdpa")  # those that run on CPU; the others have tests/rm/test_varlen.py


@pytest.fixture(scope="module")
def models(tiny_backbone):
    """The same tiny model on every backend, and the plain language model it was made of."""
    make = RubricRewardModel.from_language_model
    packed = {name: make(tiny_backbone, max_length=512, dtype="float32", attention=name) for name in BACKENDS}
    return packed, AutoModelForCausalLM.from_pretrained(tiny_backbone, attn_implementation="eager").eval()


def _separate(model: RubricRewardModel, language_model, sequences):
    """Logits from one plain causal forward pass per path: what packing must not change."""
    return torch.cat([
        model.head(language_model.base_model(torch.tensor([path]), use_cache=False).last_hidden_state[0, -1])
        for path in sequences
    ])  # fmt: skip


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(forests)
def test_packed_logits_and_gradients_equal_separate_passes(models, forest):
    packed, language_model = models
    weights = torch.linspace(-1, 1, len(paths(forest)))
    for model in packed.values():
        embedding = model.backbone.get_input_embeddings().weight
        logits = model(*pack(forest))
        (grad,) = torch.autograd.grad((weights * logits).sum(), embedding)
        want = _separate(model, language_model, paths(forest))
        reference = language_model.get_input_embeddings().weight
        (want_grad,) = torch.autograd.grad((weights * want).sum(), reference)
        torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(grad, want_grad, atol=1e-4, rtol=1e-3)


def test_order_and_neighbours_change_nothing(models):
    model = models[0]["cpu_flash"]
    criteria = [[9, 10], [11, 12, 13], [14]]
    alone = [model(*pack([Tree([3, 4], [Branch([5, 6, 7], [criterion])])])).item() for criterion in criteria]
    crowd = Tree([3, 4], [Branch([20] * 9, [[21]]), Branch([5, 6, 7], criteria[::-1]), Branch([22], [[23, 24]])])
    together = model(*pack([Tree([8], [Branch([8], [[8]])]), crowd])).tolist()
    assert together[2:5] == pytest.approx(alone[::-1], abs=1e-5)


def test_zero_shot_head_is_yes_minus_no(models, tiny_backbone):
    packed, language_model = models
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone)
    yes, no = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in (" Yes", " No"))
    path = [5, 6, 7, 8, 9]
    logits = language_model(torch.tensor([path])).logits[0, -1]
    got = packed["cpu_flash"](*pack([Tree(path[:2], [Branch(path[2:4], [path[4:]])])]))
    assert got.item() == pytest.approx((logits[yes] - logits[no]).item(), abs=1e-5)


@pytest.mark.parametrize("rank", [4, 0])
def test_saved_models_come_back_and_merge(models, tiny_backbone, tmp_path, rank):
    model = RubricRewardModel.from_language_model(tiny_backbone, max_length=512, dtype="float32")
    batch = pack([Tree([3, 4, 5], [Branch([6, 7], [[8, 9], [10]])])])
    untrained = model(*batch)
    if rank:
        model.add_lora(rank, 2 * rank)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    trained = model(*batch)
    assert (trained - untrained).abs().max() > 1e-3
    model.save(tmp_path / "a")
    files = [path.name for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert not [name for name in files if name.endswith((".bin", ".pt"))]
    loaded = RubricRewardModel.from_pretrained(tmp_path / "a", dtype="float32")
    torch.testing.assert_close(loaded(*batch), trained, atol=1e-6, rtol=0)
    loaded.merge()
    torch.testing.assert_close(loaded(*batch), trained, atol=1e-5, rtol=0)
    loaded.save(tmp_path / "b")
    merged = RubricRewardModel.from_pretrained(tmp_path / "b", dtype="float32")
    torch.testing.assert_close(merged(*batch), trained, atol=1e-5, rtol=0)


def test_lora_computes_in_the_backbones_dtype_what_peft_computes_in_float32(tiny_backbone):
    model = RubricRewardModel.from_language_model(tiny_backbone, max_length=512, dtype="bfloat16")
    model.add_lora(4, 8)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {parameter.dtype for parameter in trainable.values()} == {torch.float32}
    layer = model.backbone.base_model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours = layer(x)
    assert ours.dtype == torch.bfloat16
    layer.lora_variant.clear()
    layer.cast_input_dtype_enabled = True
    torch.testing.assert_close(ours, layer(x), atol=0.05, rtol=0.02)  # peft's own arithmetic
    model(*pack([Tree([3], [Branch([4], [[5]])])])).sum().backward()
    assert all(p.grad.dtype == torch.float32 for name, p in trainable.items() if "lora_B" in name)


def test_lora_can_be_kept_to_the_last_layers(tiny_backbone):
    model = RubricRewardModel.from_language_model(tiny_backbone, max_length=512)
    model.add_lora(2, 2, top_layers=1)
    adapted = {name.split(".layers.")[1][0] for name, p in model.named_parameters() if "lora_" in name}
    assert adapted == {"1"}


def test_folders_that_are_no_model_are_refused(tiny_backbone, tmp_path):
    with pytest.raises(UserError, match=r"is no reward model \(no rubric_rm.json\)"):
        RubricRewardModel.from_pretrained(tmp_path)
    model = RubricRewardModel.from_language_model(tiny_backbone, max_length=512)
    model.add_lora(2, 2)
    model.save(tmp_path)
    description = json.loads((tmp_path / "rubric_rm.json").read_text())
    older = {key: value for key, value in description.items() if key != "rubric_blind"}
    (tmp_path / "rubric_rm.json").write_text(json.dumps(older))
    assert not RubricRewardModel.from_pretrained(tmp_path).rubric_blind
    (tmp_path / "rubric_rm.json").write_text(json.dumps({**description, "rubric_blind": True}))
    with pytest.raises(UserError, match="another prompt template"):
        RubricRewardModel.from_pretrained(tmp_path)
    (tmp_path / "rubric_rm.json").write_text(json.dumps({**description, "template": "other"}))
    with pytest.raises(UserError, match="another prompt template"):
        RubricRewardModel.from_pretrained(tmp_path)
