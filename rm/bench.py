"""Every metric of every checkpoint on the same judged responses, with its value under each resample of prompts.

Owns which metrics there are and which way is better; the signal and noise panel (`rm.panel`) reads them from here.

Letters as in `rm.snr`. X is 1 + resamples: the value first, then the value under each resample of prompts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from rm import metrics, snr
from rm.sides import Predicted, Table, check_predictions, criterion_statistics, pair_sets, rewards
from rubric_data.pairs import Pairs
from rubric_data.records import JudgedResponse

Better = Literal["higher", "lower"]
METRICS: dict[str, Better] = {
    "accuracy": "higher",
    "auroc": "higher",
    "brier": "lower",
    "log_loss": "lower",
    "ece": "lower",
    "pair_accuracy": "higher",
    "tail_pair_accuracy": "higher",
    "spearman": "higher",
    "reward_mae": "lower",
}
TITLES = {
    "accuracy": "accuracy",
    "auroc": "AUROC",
    "brier": "Brier score",
    "log_loss": "log-loss",
    "ece": "ECE",
    "pair_accuracy": "pair accuracy",
    "tail_pair_accuracy": "tail pair accuracy",
    "spearman": "Spearman",
    "reward_mae": "reward MAE",
}

Values = dict[str, np.ndarray]  # by metric
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One training run and what its checkpoints say of the records: P(met) of every criterion, (K,) for each record.

    ``steps`` ascending, one for each of ``predictions``; ``averaged``: predictions of the means of weights over the
    blocks (`rm.snr.blocks`) of its last checkpoints, where there are any.
    """

    name: str
    steps: Sequence[int]
    predictions: Sequence[Sequence[np.ndarray]]
    averaged: Sequence[Sequence[np.ndarray]] = ()


@dataclass(frozen=True)
class Bench:
    """What every checkpoint is measured against: the judge's side, pairs of responses, resamples of prompts."""

    records: Sequence[JudgedResponse]
    table: Table
    everything: Pairs
    best: Pairs  # both in their prompt's tail
    counts_XP: np.ndarray

    @classmethod
    def of(cls, records: Sequence[JudgedResponse], tail: float, bootstrap: int, seed: int) -> "Bench":
        """The bench of ``records``; ``tail`` as in an audit."""
        table = Table.of(records)
        drawn = table.resamples(bootstrap, seed)
        return cls(records, table, *pair_sets(table, tail), np.vstack([np.ones(table.prompts), drawn]))

    def predicted(self, probs: Sequence[np.ndarray]) -> Predicted:
        """One checkpoint's side."""
        return Predicted.of(probs, self.records, self.table)

    def measure(self, probs: Sequence[np.ndarray]) -> Values:
        """Every metric of one checkpoint, (X,)."""
        table, one = self.table, self.predicted(probs)
        sides = rewards(table, one)
        statistics = criterion_statistics(table, one) | {
            "pair_accuracy": metrics.pair_accuracy(*sides, self.everything, "half"),
            "tail_pair_accuracy": metrics.pair_accuracy(*sides, self.best, "half"),
            "spearman": metrics.spearman(*sides),
            "reward_mae": reward_mae(table, one),
        }
        return {name: statistics[name].at(self.counts_XP) for name in METRICS}

    def measure_run(self, run: Run, *, progress: bool = False) -> Values:
        """Every metric of every checkpoint of ``run``, (X, C). Raises ValueError if its predictions do not fit."""
        for step, probs in zip(run.steps, run.predictions, strict=True):
            check_predictions(f"{run.name}, step {step}", probs, self.records)
        return stack([self.measure(probs) for probs in tracked(run.predictions, f"measuring {run.name}", progress)])


def reward_mae(table: Table, one: Predicted, chosen_B: np.ndarray | slice = slice(None)) -> metrics.Statistic:
    """Mean absolute difference between the predicted reward and the judge's."""
    gap_B = np.abs(one.reward_B - table.reward_B)
    return metrics.mean(gap_B[chosen_B], table.prompt_B[chosen_B], table.prompts)


def stack(values: Sequence[Values]) -> Values:
    """Values (X,) of several checkpoints as (X, C)."""
    return {name: np.stack([one[name] for one in values], -1) for name in values[0]}


def last_of(runs: Sequence[Values], last: int) -> Values:
    """The values of the last checkpoints of several runs, (X, R, C)."""
    return {name: np.stack([one[name][:, -last:] for one in runs], 1) for name in (runs[0] if runs else ())}


def estimate(value_X: np.ndarray) -> dict[str, float | None]:
    """The value with its percentile interval, as JSON has it."""
    return metrics.with_interval(float(value_X[0]), value_X[1:]).as_dict()


def signal_noise(value_XRC: np.ndarray) -> dict[str, Any]:
    """`rm.snr.signal_noise` as estimates."""
    found = snr.signal_noise(value_XRC)
    return {key: estimate(getattr(found, key)) for key in ("signal", "noise", "snr")}


def tracked(items: Sequence[T], what: str, progress: bool) -> Iterator[T]:
    """The items, with a bar on stderr if ``progress``."""
    return iter(track(items, what, console=Console(stderr=True), transient=True, disable=not progress))
