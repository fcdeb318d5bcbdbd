"""The fallback to the judge in an RL run: who pays, by how many verdicts, and what of it is kept in the run folder.

Which answers are asked for, and the asking, is `rm.fallback`.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from policy.adapter import Rollout
from policy.config import RlConfig
from policy.reward import RubricScoring
from policy.step_rewards import StepRewards
from rm.fallback import FallbackScorer
from rm.scorer import RubricScorer
from rubric_data.errors import UserError
from rubric_data.judges import Judge

LEDGER = "asked.sqlite"  # in the run folder, the ledger of what the judge was asked
ASKED, FAILED = "reward/asked", "reward/ask_failed"  # in a row of metrics.jsonl


def check_fallback(config: RlConfig) -> None:
    """Raise UserError on a budget that cannot be spent."""
    if not 0 < config.fallback_width <= 1:
        raise UserError(f"fallback_width: must lie in (0, 1], got {config.fallback_width}; 0.5 is half of the scale")
    if config.fallback_budget is None:
        return
    if config.fallback_budget < 1:
        raise UserError(
            f"fallback_budget: must be at least 1, got {config.fallback_budget}; leave it out to ask nobody"
        )
    if config.judge == "verifier" and config.use_verifiers:
        raise UserError(
            "fallback_budget: the verifier judge knows what code has answered already; choose another --judge, or set "
            "use_verifiers to false"
        )
    if config.aggregation.dropout:
        raise UserError(
            "fallback_budget: aggregation.dropout leaves out criteria that the judge would be paid for; leave one of "
            "the two out"
        )
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise UserError(f"fallback_budget: {processes} processes would each spend it; train in one, or leave it out")


def payer(config: RlConfig, scorer: RubricScorer, judge: Judge, rewards: StepRewards) -> RubricScoring:
    """What the policy is paid by: ``scorer``, with ``judge`` to fall back on where there is a budget for it.

    Of the answers it asks for those that move what ``rewards`` pays.
    """
    if config.fallback_budget is None:
        return scorer
    return FallbackScorer(
        scorer,
        judge,
        width=config.fallback_width,
        budget=config.fallback_budget,
        responses=config.steps * config.batch_size,
        worth=rewards.worth,
    )


def go_on(paying: RubricScoring, config: RlConfig, folder: Path, rows: Sequence[Mapping[str, Any]] = ()) -> None:
    """Have ``paying`` keep what it asks in the run's ``folder``, after the updates that ``rows`` are of."""
    if isinstance(paying, FallbackScorer):
        asked = sum(row[ASKED] for row in rows)
        paying.go_on(folder / LEDGER, seen=len(rows) * config.batch_size, asked=asked)


def asked_row(rollouts: Sequence[Rollout]) -> dict[str, int]:
    """How many verdicts were asked for in an update, and of how many there is none."""
    asked = [rollout.scored.asked for rollout in rollouts if rollout.scored.asked is not None]
    return {ASKED: sum(one.questions for one in asked), FAILED: sum(one.failed for one in asked)}
