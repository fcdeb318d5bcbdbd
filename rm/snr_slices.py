"""Signal and noise by criterion, tag, level, length and generator: a part of the panel (`rm.panel`).

Of criteria, tags and levels verdict metrics alone: a reward needs the whole rubric. Of lengths and generators, which
take responses whole, the reward's error too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rm.bench import METRICS, Bench, Run, Values, reward_mae, signal_noise, stack, tracked
from rm.sides import Predicted, Table, criterion_statistics
from rm.slices import labels, members
from rubric_data.records import JudgedResponse

_OF_RESPONSES = ("length", "generator")


def slices(
    bench: Bench, records: Sequence[JudgedResponse], runs: Sequence[Run], *, last: int, min_prompts: int, progress: bool
) -> dict[str, Any]:
    """Each kind's slices of ``min_prompts`` prompts or more, the best told apart first, and how many are smaller."""
    table = bench.table
    predicted = [[bench.predicted(probs) for probs in run.predictions[-last:]] for run in runs]
    response_B = np.flatnonzero(table.rewarded_B)
    found: dict[str, Any] = {}
    for kind, labelled in labels(records, table).items():
        groups = members(labelled)
        prompts = {name: len(np.unique(table.prompt_N[at_N])) for name, at_N in groups.items()}
        large = [name for name in groups if prompts[name] >= min_prompts]
        rows: list[dict[str, Any]] = []
        for name in tracked(large, f"slices by {kind}", progress):
            inside = _Inside.of(bench, groups[name])
            chosen_B = np.isin(response_B, table.response_N[groups[name]]) if kind in _OF_RESPONSES else None
            values = [stack([inside.measure(one, chosen_B) for one in run]) for run in predicted]
            by_metric = {key: signal_noise(np.stack([one[key] for one in values], 1)) for key in values[0]}
            rows.append({"name": name, "prompts": prompts[name], "verdicts": len(groups[name]), "metrics": by_metric})
        rows.sort(key=lambda row: (-(row["metrics"]["brier"]["snr"]["value"] or 0), row["name"]))
        found[kind] = {"slices": rows, "left_out": len(groups) - len(large)}
    return found


@dataclass(frozen=True)
class _Inside:
    """A bench for the verdicts of one slice. Prompts outside it change nothing, and are left out to save time."""

    bench: Bench
    chosen_N: np.ndarray
    table: Table
    counts_XP: np.ndarray

    @classmethod
    def of(cls, bench: Bench, chosen_N: np.ndarray) -> "_Inside":
        inside, prompt_N = np.unique(bench.table.prompt_N[chosen_N], return_inverse=True)
        gold_N, levels_N = bench.table.gold_N[chosen_N], bench.table.levels_N[chosen_N]
        table = replace(
            bench.table, text_P=bench.table.text_P[inside], gold_N=gold_N, prompt_N=prompt_N, levels_N=levels_N
        )
        return cls(bench, chosen_N, table, bench.counts_XP[:, inside])

    def measure(self, one: Predicted, chosen_B: np.ndarray | None) -> Values:
        """Verdict metrics of one checkpoint, (X,), and the reward's error on responses that are chosen, if any are."""
        statistics = criterion_statistics(self.table, replace(one, prob_N=one.prob_N[self.chosen_N]))
        found = {name: statistics[name].at(self.counts_XP) for name in METRICS if name in statistics}
        if chosen_B is not None:
            found["reward_mae"] = reward_mae(self.bench.table, one, chosen_B).at(self.bench.counts_XP)
        return found
