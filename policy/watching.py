"""The judge in the loop: asked about a few rollouts of an update, heard when the policy's gold reward falls.

Owns when and about what the judge is asked, what the log says of it, and what an alarm leads to; the arithmetic is
`policy.watch`, the kept adapter `policy.checkpoint`.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from policy.adapter import Rollout
from policy.checkpoint import BestAdapter
from policy.evaluate import gold_reward, gold_verdicts
from policy.rollouts import JudgedRollouts
from policy.watch import Fall, GoldEstimate, Slope, Trend, draw, estimate_gold, inclusion
from rubric_data.errors import UserError
from rubric_data.files import write_json
from rubric_data.judges import Judge

logger = logging.getLogger(__name__)
OnAlarm = Literal["warn", "stop", "rollback"]
_STATE = "watch.json"  # in a checkpoint
DECLINE, DIVERGENCE = "decline", "divergence"  # what the log calls the two alarms


class GoldFell(Exception):
    """Gold reward has declined and the run is to end; raised through a trainer that knows no other way to stop."""


class GoldWatch:
    """Looks at an update's rollouts through the judge, and keeps the policy that wrote the best ones in ``best``.

    ``sample`` rollouts are judged at each of ``looks`` updates, spread evenly over ``steps``, and kept in ``judged``. A
    growing distance between proxy and gold only warns, as gold may rise meanwhile; a decline of gold does what
    ``on_alarm`` says.
    """

    def __init__(
        self,
        judge: Judge,
        best: BestAdapter,
        judged: JudgedRollouts,
        *,
        steps: int,
        sample: int,
        looks: int,
        on_alarm: OnAlarm,
        seed: int,
    ) -> None:
        self._judge, self._best, self._judged = judge, best, judged
        self._steps, self._sample, self._looks, self._seed = steps, sample, looks, seed
        self._on_alarm = on_alarm
        self._slope, self._gold, self._closeness = Slope(), Trend(looks), Trend(looks)
        self._done = 0  # looks
        self._compared: list[tuple[int, GoldEstimate]] = []  # those with an interval, by update
        self._best_step: int | None = None
        self._alarm: str | None = None

    def begin(self) -> None:
        """The policy is now the one that the next update's rollouts are written with."""
        self._best.remember()

    def look(self, step: int, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        """Judge update ``step`` (from 1), if a look is due; its part of a row of metrics.jsonl."""
        self._alarm = None
        estimate, failed = GoldEstimate(), 0
        if rollouts and self._done < self._looks and is_due(step, self._looks, self._steps):
            estimate, failed = self._ask(step, rollouts)
        if estimate.degrees:
            self._compare(step, estimate)
        self._best.remember()
        low, high = estimate.interval
        return {
            "reward/gold": _number(estimate.gold),
            "reward/gold_low": _number(low),
            "reward/gold_high": _number(high),
            "reward/divergence": _number(estimate.divergence),
            "reward/judged": estimate.judged,
            "reward/judge_failed": failed,
            "best_step": self._best_step,
            "alarm": self._alarm,
        }

    def act(self) -> None:
        """Do what the last look asks for. Raises `GoldFell` to end the run, the policy rolled back if it is to be."""
        if self._alarm != DECLINE or self._on_alarm == "warn":
            return
        if self._on_alarm == "rollback":
            self._best.restore()
        raise GoldFell

    def save(self, folder: Path) -> None:
        """Write what is known so far, the best policy included, into ``folder``, a checkpoint's."""
        folder.mkdir(parents=True, exist_ok=True)
        self._best.save(folder / "best")
        compared = [[step, asdict(estimate)] for step, estimate in self._compared]
        state = {"done": self._done, "best_step": self._best_step, "slope": self._slope.sums, "compared": compared}
        write_json(folder / _STATE, state)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote. More updates may be planned by now, and hence wider limits."""
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        self._best.take(folder / "best")
        self._done, self._best_step = state["done"], state["best_step"]
        self._slope = Slope(*state["slope"])
        looks = max(self._looks, self._done)
        self._gold, self._closeness = Trend(looks), Trend(looks)
        for step, estimate in state["compared"]:
            self._add(step, GoldEstimate(**estimate))

    def _ask(self, step: int, rollouts: Sequence[Rollout]) -> tuple[GoldEstimate, int]:
        """The estimate, and how many rollouts were drawn in vain."""
        self._done += 1
        proxy_N = np.array([rollout.reward for rollout in rollouts])
        chance_N = inclusion(self._sample, proxy_N, np.array([rollout.doubt for rollout in rollouts]))
        drawn = np.flatnonzero(draw(chance_N, np.random.default_rng([self._seed, step])))
        asked = [rollouts[place] for place in drawn.tolist()]
        verdicts = gold_verdicts(self._judge, [one.prompt for one in asked], [one.response for one in asked])
        self._judged.add(step, asked, verdicts)
        gold_N = np.full(len(rollouts), np.nan)
        gold_N[drawn] = [gold_reward(one.prompt.rubric, own) for one, own in zip(asked, verdicts, strict=True)]
        prompt_N = np.array([rollout.prompt.prompt_id for rollout in rollouts])
        estimate = estimate_gold(proxy_N, gold_N, chance_N, prompt_N, self._slope.value)
        self._slope.add(proxy_N, gold_N, chance_N)
        return estimate, len(asked) - estimate.judged

    def _compare(self, step: int, estimate: GoldEstimate) -> None:
        """With the looks before: is this the best, has gold fallen, has the proxy run away?"""
        before = self._gold.best
        fall, apart = self._add(step, estimate)
        best = self._gold.best
        if best is not None and best != before:
            self._best.keep(step)
            self._best_step = step
        if fall is not None:
            self._alarm = DECLINE
            logger.warning("gold reward has declined: %s", told(fall))
        elif apart is not None:
            self._alarm = DIVERGENCE
            logger.warning("proxy and gold reward drift apart; gold less proxy: %s", told(apart))

    def _add(self, step: int, estimate: GoldEstimate) -> tuple[Fall | None, Fall | None]:
        """A fall of gold, and one of gold less proxy."""
        self._compared.append((step, estimate))
        return (
            self._gold.add(step, estimate.gold, estimate.variance, estimate.degrees),
            self._closeness.add(step, -estimate.divergence, estimate.divergence_variance, estimate.degrees),
        )


def planned_looks(steps: int, sample: int, budget: int | None) -> int:
    """How many updates are judged: all, or as many as ``budget`` rollouts pay for. Raises UserError if for none."""
    if budget is not None and budget < sample:
        raise UserError(
            f"gold_budget: {budget} rollouts do not pay for one sample of {sample}; raise it, or lower gold_sample"
        )
    return steps if budget is None else min(steps, budget // sample)


def is_due(step: int, looks: int, steps: int) -> bool:
    """Whether update ``step`` (from 1) is one of ``looks`` spread evenly over ``steps``; the last one always is."""
    return step * looks // steps > (step - 1) * looks // steps


def told(fall: Fall) -> str:
    """A fall in words."""
    before, after = fall.before, fall.after
    return (
        f"at least {before.low:.3f} over updates {before.first} to {before.last}, "
        f"at most {after.high:.3f} over {after.first} to {after.last}"
    )


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
