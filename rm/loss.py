"""The distillation loss: soft binary cross-entropy over verdicts, and a pairwise loss over rewards. Pure functions.

A criterion of L levels is L - 1 questions, "is it level j or better?" (`rm.levels`), each worth 1 / (L - 1) of a
verdict. ``levels_N`` says how many levels the criterion of each verdict has; without it all are yes or no, M is N.

Shape letters: N (response, criterion) pairs, M steps of them, R responses, P pairs of responses to one prompt.
"""

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from rm.data import MASKED

PAIR_TEMPERATURE = 0.1  # of reward differences: a tenth of the reward scale is a clear preference


class _Steps(NamedTuple):
    """`rm.levels.Steps` as tensors on the device: whose each step is, j - 1 and L - 1, (M,)."""

    verdict_M: Tensor
    below_M: Tensor
    last_M: Tensor

    @classmethod
    def of(cls, like_N: Tensor, levels_N: Tensor | None) -> Self:
        each_N = torch.arange(len(like_N), device=like_N.device)
        if levels_N is None:
            return cls(each_N, torch.zeros_like(each_N), torch.ones_like(each_N))
        last_N = levels_N - 1
        verdict_M = each_N.repeat_interleave(last_N)
        below_M = torch.arange(len(verdict_M), device=like_N.device) - (last_N.cumsum(0) - last_N)[verdict_M]
        return cls(verdict_M, below_M, last_N[verdict_M])


def verdict_loss(logits_M: Tensor, labels_N: Tensor, counts_N: Tensor, levels_N: Tensor | None = None) -> Tensor:
    """Sum of soft binary cross-entropies, each times its count; labels in [0, 1], `MASKED` ones left out. A scalar.

    Of yes and no that is the negative log-likelihood of ``counts`` answers of which a share ``labels`` said "met", up
    to a constant. Of a graded verdict it is the mean over its steps, a proper score, whose gradient in the verdict's
    own logit is the error of its expected level: no larger than that of yes and no.
    """
    steps = _Steps.of(labels_N, levels_N)
    known_M = (labels_N != MASKED)[steps.verdict_M]
    targets_M = (labels_N[steps.verdict_M] * steps.last_M - steps.below_M).clamp(0, 1)
    weights_M = counts_N[steps.verdict_M] / steps.last_M
    return F.binary_cross_entropy_with_logits(
        logits_M[known_M], targets_M[known_M], weights_M[known_M], reduction="sum"
    )


def expected_levels(logits_M: Tensor, levels_N: Tensor) -> Tensor:
    """Expected level of each verdict over the best one, (N,) in [0, 1]; of yes and no P(met)."""
    steps = _Steps.of(levels_N, levels_N)
    zeros = logits_M.new_zeros(len(levels_N))
    return zeros.index_add(0, steps.verdict_M, logits_M.sigmoid() / steps.last_M)


def predicted_rewards(
    logits_M: Tensor,
    weights_N: Tensor,
    veto_N: Tensor,
    response_N: Tensor,
    responses: int,
    levels_N: Tensor | None = None,
) -> Tensor:
    """Differentiable rewards (R,) in [0, 1]: `rubric_data.reward.weighted_mean_reward` on expected levels."""
    levels_N = torch.full_like(response_N, 2) if levels_N is None else levels_N
    probs = expected_levels(logits_M, levels_N)
    zeros = logits_M.new_zeros(responses)
    total = zeros.index_add(0, response_N, weights_N * probs)
    best = zeros.index_add(0, response_N, weights_N.clamp(min=0))
    vetoes = zeros.index_add(0, response_N, torch.where(veto_N, _log_expected(logits_M, levels_N), 0.0)).exp()
    return (total / best).clamp(0, 1) * vetoes


def _log_expected(logits_M: Tensor, levels_N: Tensor) -> Tensor:
    """Logarithm of `expected_levels`, with a gradient where they are next to nothing."""
    steps = _Steps.of(levels_N, levels_N)
    logits_NJ = logits_M.new_full((len(levels_N), int(levels_N.max()) - 1), -torch.inf)
    logits_NJ[steps.verdict_M, steps.below_M] = F.logsigmoid(logits_M)
    return logits_NJ.logsumexp(-1) - (levels_N - 1).to(logits_M).log()


def pairwise_loss(rewards_R: Tensor, pairs_P2: Tensor, pair_weights_P: Tensor) -> Tensor:
    """Weighted sum of -log sigmoid((better - worse) / `PAIR_TEMPERATURE`): Bradley-Terry on rewards. A scalar."""
    better, worse = rewards_R[pairs_P2].unbind(-1)
    return -(pair_weights_P * F.logsigmoid((better - worse) / PAIR_TEMPERATURE)).sum()


def distillation_loss(
    logits_M: Tensor,
    labels_N: Tensor,
    counts_N: Tensor,
    weights_N: Tensor,
    veto_N: Tensor,
    response_N: Tensor,
    pairs_P2: Tensor,
    pair_weights_P: Tensor,
    levels_N: Tensor | None = None,
    *,
    pairwise_weight: float,
    verdicts: Tensor | int,
) -> Tensor:
    """Both losses per verdict: (verdict loss + ``pairwise_weight`` * pairwise loss) / ``verdicts``.

    ``verdicts`` is the number of unmasked labels in the whole optimiser step, over all its micro-batches and processes,
    so that how a step is cut up does not change its gradient. ``counts`` are relative to the mean over the training
    data (`rm.data`), never over a batch, for the same reason.
    """
    total = verdict_loss(logits_M, labels_N, counts_N, levels_N)
    if pairwise_weight and len(pairs_P2):
        rewards = predicted_rewards(logits_M, weights_N, veto_N, response_N, int(response_N.max()) + 1, levels_N)
        total = total + pairwise_weight * pairwise_loss(rewards, pairs_P2, pair_weights_P)
    return total / verdicts
