"""The value model: cheap, frozen but for its head, zero at first."""

import pytest
import torch

from policy.critic import FrozenCritic
from rm.backbone import load_causal_lm

pytest.importorskip("trl.experimental.ppo", reason="needs TRL with PPO")
from trl.experimental.utils import get_reward

IDS = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 8, 7, 6, 5, 0]])


@pytest.fixture
def model(tiny_backbone):
    return load_causal_lm(tiny_backbone)


def test_it_starts_at_zero_and_only_its_head_learns(model):
    critic = FrozenCritic(model, depth=1)
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
    critic = FrozenCritic(model, depth=1)
    assert len(critic.backbone.decoder.layers) == 1
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=0)
    assert not {id(weight) for weight in critic.parameters()} & {id(weight) for weight in model.parameters()}


def test_at_full_depth_its_features_are_the_models_own(model):
    with torch.no_grad():
        own = model.model(IDS, output_hidden_states=True).hidden_states[-1]
    features = FrozenCritic(model, depth=99).backbone(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(features, own)
