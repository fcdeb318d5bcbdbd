"""The value model of PPO: what reward a state promises. Owns its shape; TRL trains it.

Its backbone is a frozen copy of the policy's first layers and only a linear head learns, so that a critic costs
a small share of the policy's forward pass and no backward pass. The head starts at zero: at first every state is
worth nothing, and the advantage is the reward itself.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class FrozenCritic(nn.Module):
    """A value model for TRL's PPO: ``backbone`` (frozen) and ``score`` (B, T, D) -> (B, T, 1) float32, zero at first.

    ``depth`` is how many of ``model``'s layers the backbone keeps; ``model`` must still be without adapters.
    """

    base_model_prefix = "backbone"  # the name TRL looks the backbone up by

    def __init__(self, model: PreTrainedModel, depth: int) -> None:
        super().__init__()
        self.backbone = _Frozen(model.get_decoder(), depth)
        self.score = _ValueHead(model.config.get_text_config().hidden_size)


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
