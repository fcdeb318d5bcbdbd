"""Three ways to more signal or less noise, tried on the user's own runs: means over checkpoints, continuous metrics in
place of counts, and leaving out noisy criteria (Heineman et al. 2025, section 5).

A part of the signal and noise panel; what it is taken from is `rm.bench`, the formulas are `rm.snr`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rm import metrics, snr
from rm.bench import Bench, Run, Values, estimate, last_of, stack
from rm.sides import Table
from rm.slices import labels, members
from rubric_data.files import json_number
from rubric_data.records import JudgedResponse

CONTINUOUS = {"accuracy": ("auroc", "brier", "log_loss"), "pair_accuracy": ("spearman", "reward_mae")}
FILTERED = {"accuracy": metrics.accuracy, "brier": metrics.brier, "log_loss": metrics.log_loss}  # means over verdicts
RARE = "(rarer ones)"


# --- means over checkpoints ------------------------------------------------------------------------------------------


def averaging(bench: Bench, runs: Sequence[Run], ends: Values, size: int) -> dict[str, Any] | None:
    """Means over ``size`` neighbours among the last checkpoints: of the metric, of the scores, of the weights.

    ``ends`` the metrics of the last checkpoints, (X, R, C). None with fewer than two blocks of neighbours.
    """
    last = next(iter(ends.values())).shape[-1]
    parts = snr.blocks(last, size)
    if len(parts) < 2:
        return None
    ways = {"metric": {name: np.stack([v[..., part].mean(-1) for part in parts], -1) for name, v in ends.items()}}
    scores = [[_mean_scores(run.predictions[-last:][part]) for part in parts] for run in runs]
    ways["scores"] = last_of([stack([bench.measure(probs) for probs in one]) for one in scores], len(parts))
    if all(len(run.averaged) == len(parts) for run in runs):
        weights = [stack([bench.measure(probs) for probs in run.averaged]) for run in runs]
        ways["weights"] = last_of(weights, len(parts))

    def row(value_XRC: np.ndarray, single_X: np.ndarray) -> dict[str, Any]:
        found_X = snr.signal_noise(value_XRC).snr
        return {
            "level": json_number(value_XRC[0].mean()),
            "snr": estimate(found_X),
            "snr_minus_single": estimate(found_X - single_X),
        }

    single = {name: snr.signal_noise(value_XRC).snr for name, value_XRC in ends.items()}
    rows = {
        name: {way: row(values[name], single[name]) for way, values in ({"single": ends} | ways).items()}
        for name in ends
    }
    return {"size": size, "blocks": len(parts), "metrics": rows}


def _mean_scores(predictions: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    return [np.mean(probs, 0) for probs in zip(*predictions, strict=True)]


# --- continuous metrics ----------------------------------------------------------------------------------------------


def continuous(ratios: Values, decisions: Values) -> list[dict[str, Any]]:
    """Metrics that see how far a prediction is off, in place of those that count which side it is on.

    ``ratios`` and ``decisions``: signal-to-noise ratio and decision accuracy of every metric, (X,).
    """
    return [
        {
            "metric": metric,
            "in_place_of": counted,
            "snr_minus": estimate(ratios[metric] - ratios[counted]),
            "decision_minus": estimate(decisions[metric] - decisions[counted]),
        }
        for counted, others in CONTINUOUS.items()
        for metric in others
    ]


# --- leaving out noisy criteria --------------------------------------------------------------------------------------


def filtering(
    bench: Bench, records: Sequence[JudgedResponse], runs: Sequence[Run], *, last: int, min_prompts: int, seed: int
) -> dict[str, Any] | None:
    """Leave out noisy groups of criteria: which, is chosen on one half of the prompts; the gain is the other half's.

    None unless there are two groups in enough prompts of both halves.
    """
    table = bench.table
    shuffled = np.random.default_rng(seed).permutation(table.prompts)
    choosing_N = np.isin(table.prompt_N, shuffled[: table.prompts // 2])
    kind, names, unit_N = _units(records, table, choosing_N, min_prompts)
    if len(names) < 2:
        return None
    probs = [[bench.predicted(one).prob_N for one in run.predictions[-last:]] for run in runs]
    rows = {}
    for metric in FILTERED:
        total_URC, count_U = _unit_sums(metric, table, probs, unit_N, choosing_N, len(names))
        kept_U = snr.choose_units(total_URC, count_U)
        all_X = _ratio(metric, bench, probs, ~choosing_N)
        kept_X = _ratio(metric, bench, probs, ~choosing_N & kept_U[unit_N])
        rows[metric] = {
            "kept": [name for name, kept in zip(names, kept_U, strict=True) if kept],
            "dropped": [name for name, kept in zip(names, kept_U, strict=True) if not kept],
            "chosen_on": {
                "all": json_number(snr.joint_ratio(total_URC, count_U)),
                "kept": json_number(snr.joint_ratio(total_URC[kept_U], count_U[kept_U])),
            },
            "judged_on": {
                "all": estimate(all_X),
                "kept": estimate(kept_X),
                "kept_minus_all": estimate(kept_X - all_X),
            },
        }
    half = table.prompts // 2
    return {"by": kind, "groups": len(names), "prompts": [half, table.prompts - half], "metrics": rows}


def _units(
    records: Sequence[JudgedResponse], table: Table, choosing_N: np.ndarray, min_prompts: int
) -> tuple[str, list[str], np.ndarray]:
    """What criteria are chosen by: kind, names of the groups, and the group of each verdict, (N,).

    Texts of criteria where two or more of them stand in ``min_prompts`` prompts of either half; else sets of tags.
    Rarer ones are one group. No names where there are too few of both.
    """

    def common(at_N: np.ndarray) -> bool:
        sides = (at_N[choosing_N[at_N]], at_N[~choosing_N[at_N]])
        return all(len(np.unique(table.prompt_N[side])) >= min_prompts for side in sides)

    labelled = labels(records, table)
    for kind in ("criterion", "tag"):
        name_N = [", ".join(names) for names in labelled[kind]]
        found = members([(name,) for name in name_N])
        names = [name for name, at_N in found.items() if common(at_N)]
        if len(names) > 1:
            number = {name: place for place, name in enumerate(names)}
            unit_N = np.array([number.get(name, len(names)) for name in name_N])
            return kind, names if len(names) == len(found) else [*names, RARE], unit_N
    return "", [], np.zeros(len(choosing_N), int)


def _unit_sums(
    metric: str,
    table: Table,
    probs: Sequence[Sequence[np.ndarray]],
    unit_N: np.ndarray,
    chosen_N: np.ndarray,
    units: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Of a mean over the chosen verdicts: its sums by unit, run and checkpoint, (U, R, C), and its counts, (U,)."""
    gold, unit = table.gold_N[chosen_N], unit_N[chosen_N]
    # a unit in the place of a prompt: the statistic then holds sums by unit
    sums = [[FILTERED[metric](gold, one[chosen_N], unit, units) for one in run] for run in probs]
    total_URC = np.stack([np.stack([one.total_P for one in run], -1) for run in sums], 1)
    return total_URC, sums[0][0].count_P


def _ratio(metric: str, bench: Bench, probs: Sequence[Sequence[np.ndarray]], chosen_N: np.ndarray) -> np.ndarray:
    """Signal-to-noise ratio over the chosen verdicts, (X,)."""
    gold, prompt = bench.table.gold_N[chosen_N], bench.table.prompt_N[chosen_N]
    value_RC = [
        [FILTERED[metric](gold, one[chosen_N], prompt, bench.table.prompts).at(bench.counts_XP) for one in run]
        for run in probs
    ]
    return snr.signal_noise(np.stack([np.stack(run, -1) for run in value_RC], 1)).snr
