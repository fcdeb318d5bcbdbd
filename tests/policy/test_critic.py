"""The value model: cheap, frozen but for its head, zero at first."""

import pytest
import torch

from policy.critic import FrozenCritic, build_critic
from rm.backbone import load_causal_lm, load_tokenizer
from rm.scorer import RubricScorer
from rubric_data.errors import UserError

pytest.importorskip("trl.experimental.ppo", reason="needs TRL with PPO")
from trl.experimental.utils import get_reward

IDS = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 8, 7, 6, 5, 0]])


@pytest.fixture
def model(tiny_backbone):
    return load_causal_lm(tiny_backbone)


def test_it_starts_at_zero_and_only_its_head_learns(model):
    critic = FrozenCritic(model.get_decoder(), depth=1)
    values, _, _ = get_reward(critic, IDS, 0, 2)
    assert values.shape == (2, 6, 1)
    assert values.dtype == torch.float32
    assert not values.any()
    values.sum().backward()
    learning = [name for name, weight in critic.named_parameters() if weight.requires_grad]
    assert learning == ["score.weight", "score.bias"]
    assert critic.score.weight.grad.abs().sum() > 0


def test_it_keeps_the_first_layers_and_leaves_the_model_whole(model):
    before = model(IDS).logits
    critic = FrozenCritic(model.get_decoder(), depth=1)
    assert len(critic.backbone.decoder.layers) == 1
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=0)
    assert not {id(weight) for weight in critic.parameters()} & {id(weight) for weight in model.parameters()}


def test_at_full_depth_its_features_are_the_models_own(model):
    with torch.no_grad():
        own = model.model(IDS, output_hidden_states=True).hidden_states[-1]
    features = (
        FrozenCritic(model.get_decoder(), depth=99).backbone(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    )
    torch.testing.assert_close(features, own)


def test_the_reward_models_layers_read_plain_rows_as_it_reads_trees(model, tiny_backbone):
    tokenizer, scorer = (
        load_tokenizer(tiny_backbone),
        RubricScorer.zero_shot(tiny_backbone, dtype="float32", max_length=512),
    )
    with torch.no_grad():
        scorer.model.backbone.layers[0].mlp.down_proj.weight.mul_(2)  # trained: no longer the policy's
        model.model.load_state_dict(scorer.model.backbone.state_dict())
        own = model.model(IDS, output_hidden_states=True).hidden_states[-1]
    critic = build_critic("reward_model", 2, load_causal_lm(tiny_backbone), tokenizer, scorer)
    features = critic.backbone(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(features, own)
    assert not critic.score.weight.any()
    assert scorer.model.backbone.config._attn_implementation == "rubric_tree"  # the copy's alone was changed


def test_a_reward_model_of_another_vocabulary_is_refused(model, tiny_backbone):
    scorer = RubricScorer.zero_shot(tiny_backbone, dtype="float32", max_length=512)
    tokenizer = load_tokenizer(tiny_backbone)
    tokenizer.add_tokens(["new"])
    with pytest.raises(UserError, match="critic_from: the reward model's vocabulary is not the policy's"):
        build_critic("reward_model", 1, model, tokenizer, scorer)
