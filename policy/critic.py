"""The value model of PPO: what reward a state promises. Owns its shape; TRL trains it.

Its backbone is a frozen copy of the first layers of a decoder, the policy's or the reward model's, and only a linear
head learns, so that a critic costs a small share of the policy's forward pass and no backward pass. The head starts at
zero: at first every state is worth nothing, and the advantage is the reward itself.
"""

import copy
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rm.scorer import RubricScorer
from rubric_data.errors import UserError


class FrozenCritic(nn.Module):
    """A value model for TRL's PPO: ``backbone`` (frozen) and ``score`` (B, T, D) -> (B, T, 1) float32, zero at first.

    ``depth`` is how many of ``decoder``'s layers the backbone keeps; it must be without adapters. ``attention``: how
    the copy attends, in transformers' words, where ``decoder`` itself takes more than ids and mask to do so.
    """

    base_model_prefix = "backbone"  # the name TRL looks the backbone up by

    def __init__(self, decoder: Any, depth: int, *, attention: str | None = None) -> None:
        super().__init__()
        self.backbone = _Frozen(decoder, depth)
        if attention is not None:
            self.backbone.decoder.set_attn_implementation(attention)
        self.score = _ValueHead(decoder.config.get_text_config().hidden_size)


def build_critic(
    source: Literal["policy", "reward_model"],
    depth: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scorer: RubricScorer,
) -> FrozenCritic:
    """A critic on the first ``depth`` layers of the policy ``model``, or of the reward model that ``scorer`` asks.

    Raises UserError if that reads by other tokens than the policy's.
    """
    if source == "policy":
        return FrozenCritic(model.get_decoder(), depth)
    if scorer.encoder.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            "critic_from: the reward model's vocabulary is not the policy's, and the critic reads the policy's tokens; "
            "set it to policy"
        )
    return FrozenCritic(scorer.model.backbone, depth, attention=model.config._attn_implementation)


class _Frozen(nn.Module):
    def __init__(self, decoder: nn.Module, depth: int) -> None:
        super().__init__()
        layers: Any = decoder.layers
        try:
            decoder.layers = layers[:depth]  # before copying, so that the rest is never copied
            kept: Any = copy.deepcopy(decoder).eval().requires_grad_(False)
        finally:
            decoder.layers = layers
        kept.config.num_hidden_layers = len(kept.layers)
        self.decoder = kept

    @torch.no_grad()
    def forward(self, **inputs: Any) -> Any:
        """As the decoder's own, without gradient; ids (B, T) in, hidden states (B, T, D) out."""
        return self.decoder(**{**inputs, "use_cache": False})


class _ValueHead(nn.Linear):
    """A linear head in float32 whatever the backbone computes in."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1, dtype=torch.float32)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_BTD.float())
