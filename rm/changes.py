"""What further training changed: the arithmetic of before and after, what was forgotten, tables and a plot of it.

Owns no training and no files but the plot. The statistics are `rm.metrics`; which verdicts and pairs count, `rm.sides`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table as TextTable

from rm import metrics
from rm.page import BLUE, GREY, ORANGE, short, signed
from rm.sides import Predicted, Table, criterion_statistics, pair_sets, rewards
from rubric_data.files import atomic_path, json_number
from rubric_data.pairs import Pairs, same_prompt_pairs
from rubric_data.records import JudgedResponse

TAILS = (0.5, 0.25, 0.1)  # top shares of each prompt that are always reported
BINS = 5
TAIL_ACCURACY = "tail_pair_accuracy"
_LIMITS = (-0.04, 1.04)  # of what lies in [0, 1], with room for the marks at its ends
_VERDICT = ("brier", "concordance")
# of each guarded number, the sign of a change for the worse
_HURT = {"brier": 1, "concordance": -1, "pair_accuracy": -1}

Probs = Sequence[np.ndarray]  # P(met) of every criterion, (K,) for each response


def numbers(records: Sequence[JudgedResponse], probs: Probs, tail: float) -> dict[str, float]:
    """Brier score, concordance, pair accuracy over all and in each prompt's top ``tail``; undefined ones left out."""
    table = Table.of(records)
    one = Predicted.of(probs, records, table)
    verdicts = criterion_statistics(table, one)
    found: dict[str, metrics.Statistic] = {key: verdicts[key] for key in _VERDICT}
    for key, pairs in zip(("pair_accuracy", TAIL_ACCURACY), pair_sets(table, tail), strict=True):
        found[key] = metrics.pair_accuracy(*rewards(table, one), pairs, "half")
    values = {key: metrics.value(statistic, table.prompts) for key, statistic in found.items()}
    return {key: value for key, value in values.items() if not np.isnan(value)}


def forgotten(before: Mapping[str, float], after: Mapping[str, float], tolerance: float) -> list[str]:
    """What got worse over all verdicts and pairs by more than ``tolerance``: a phrase for each, none if all held."""
    return [
        f"{key.replace('_', ' ')} {'rose' if sign > 0 else 'fell'} from {before[key]:.4f} to {after[key]:.4f}"
        for key, sign in _HURT.items()
        if key in before and key in after and sign * (after[key] - before[key]) > tolerance
    ]


def compare(
    records: Sequence[JudgedResponse], before: Probs, after: Probs, *, tail: float, bootstrap: int, seed: int
) -> dict[str, Any]:
    """Agreement with the judge before and after, and the change, as JSON-able values (docs/metrics.md, tail.json).

    Every interval comes from the same ``bootstrap`` resamples of prompts; the change is paired. The quantiles are
    equal-mass bins of the judge's reward over all prompts, the worst responses first.
    """
    table = Table.of(records)
    sides = {name: Predicted.of(probs, records, table) for name, probs in (("before", before), ("after", after))}
    counts_RP = table.resamples(bootstrap, seed)

    def settle(found: Mapping[str, Mapping[str, metrics.Statistic]]) -> dict[str, Any]:
        old, new = found["before"], found["after"]
        changes = {key: metrics.difference(new[key], old[key], counts_RP) for key in old}
        return {
            key: {
                "before": metrics.estimate(old[key], counts_RP).as_dict(),
                "after": metrics.estimate(new[key], counts_RP).as_dict(),
                "change": change.as_dict(),
            }
            for key, change in changes.items()
        }

    everything = same_prompt_pairs(table.prompt_B)
    shares = sorted({*TAILS, tail}, reverse=True)
    sets = {"all": everything} | {f"top_{100 * share:g}": pair_sets(table, share)[1] for share in shares}
    bin_B, bin_N = _bins(table)
    rows = []
    for index in np.unique(bin_B):
        chosen_B, chosen_N = bin_B == index, bin_N == index
        within = everything.within(np.where(chosen_B, 0, -1))
        rows.append(
            {
                "low": json_number(table.reward_B[chosen_B].min()),
                "high": json_number(table.reward_B[chosen_B].max()),
                "responses": int(chosen_B.sum()),
                "pairs": _ordered(table, within),
                "gold": metrics.estimate(_mean(table, table.reward_B, chosen_B), counts_RP).as_dict(),
            }
            | settle(
                {
                    name: {
                        "pair_accuracy": metrics.pair_accuracy(*rewards(table, one), within, "half"),
                        "proxy": _mean(table, one.reward_B, chosen_B),
                        "error": _mean(table, np.abs(one.reward_B - table.reward_B), chosen_B),
                        "brier": criterion_statistics(table, one, chosen_N)["brier"],
                    }
                    for name, one in sides.items()
                }
            )
        )
    return {
        "prompts": table.prompts,
        "responses": len(records),
        "verdicts": len(table.gold_N),
        "verdict": settle({name: criterion_statistics(table, one) for name, one in sides.items()}),
        "pairs": {key: _ordered(table, pairs) for key, pairs in sets.items()},
        "pair_accuracy": settle(
            {
                name: {key: metrics.pair_accuracy(*rewards(table, one), pairs, "half") for key, pairs in sets.items()}
                for name, one in sides.items()
            }
        ),
        "by_quantile": rows,
    }


def _bins(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """The bin of each rewarded response, and of each known verdict; -1 where its response has no reward."""
    bin_B = metrics.equal_mass_bins(table.reward_B, BINS)
    of_response = np.full(len(table.rewarded_B), -1)
    of_response[table.rewarded_B] = bin_B
    return bin_B, of_response[table.response_N]


def _mean(table: Table, value_B: np.ndarray, chosen_B: np.ndarray) -> metrics.Ratio:
    return metrics.mean(value_B[chosen_B], table.prompt_B[chosen_B], table.prompts)


def _ordered(table: Table, pairs: Pairs) -> int:
    """How many of ``pairs`` the judge tells apart."""
    return int((table.reward_B[pairs.first_M] != table.reward_B[pairs.second_M]).sum())


# --- what it looks like ----------------------------------------------------------------------------------------------


def tables(title: str, found: Mapping[str, Any]) -> list[TextTable]:
    """What `compare` found: over all and in the tail, then by quantile of the judge's reward, for 80 columns."""
    first = _table(f"{title} before and after, {found['prompts']} prompts", "number")
    for key, label in (("brier", "Brier score"), ("concordance", "concordance"), ("ece", "ECE")):
        first.add_row(label, "", *_cells(found["verdict"][key]))
    for key, change in found["pair_accuracy"].items():
        first.add_row(f"pair accuracy, {_share(key)}", str(found["pairs"][key]), *_cells(change))
    second = _table("By quantile of the judge's reward", "reward of the judge")
    for row in found["by_quantile"]:
        second.add_row(f"{_range(row, ' to ')}, pair accuracy", str(row["pairs"]), *_cells(row["pair_accuracy"]))
        second.add_row("  error of the reward", str(row["responses"]), *_cells(row["error"]))
    return [first, second]


def _table(title: str, first: str) -> TextTable:
    table = TextTable(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for column in ("n", "before", "after", "change [95 %]"):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _cells(change: Mapping[str, Mapping[str, float | None]]) -> tuple[str, str, str]:
    gain = change["change"]
    shown = signed(gain["value"])
    if gain["low"] is not None:
        shown += f" [{signed(gain['low'])} {signed(gain['high'])}]"
    return short(change["before"]["value"], 3), short(change["after"]["value"], 3), shown


def _share(key: str) -> str:
    return key.replace("top_", "top ") + (" %" if key != "all" else "")


def _range(row: Mapping[str, Any], to: str) -> str:
    low, high = f"{row['low']:.2f}", f"{row['high']:.2f}"
    return low if low == high else low + to + high


def plot(path: str | Path, sets: Mapping[str, Mapping[str, Any]]) -> None:
    """A row for each of the sets that `compare` was asked about, by title: pair accuracy by tail, the same by quantile
    of the judge's reward, and mean rewards by quantile, before and after."""
    from matplotlib.figure import Figure  # not pyplot: it would choose a window system

    figure = Figure(figsize=(12.6, 3.9 * len(sets)), layout="constrained")
    for row, (title, found) in zip(figure.subplots(len(sets), 3, squeeze=False), sets.items(), strict=True):
        _draw_set(row, "" if len(sets) == 1 else f"{title}: ", found)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _draw_set(panels: Sequence[Any], title: str, found: Mapping[str, Any]) -> None:
    tails, quantiles, means = panels
    rows = found["by_quantile"]
    ranges = [_range(row, "–") for row in rows]
    names = list(found["pair_accuracy"])
    _draw_pairs(tails, [_share(name) for name in names], list(found["pair_accuracy"].values()))
    tails.set(
        xlabel="responses of each prompt, by the judge", ylabel="pair accuracy", title=f"{title}pairs in the tail"
    )
    _draw_pairs(quantiles, ranges, [row["pair_accuracy"] for row in rows])
    quantiles.set(xlabel="reward of the judge, by quantile", ylabel="pair accuracy", title="pairs within a quantile")
    means.plot(ranges, [row["gold"]["value"] for row in rows], color=GREY, linestyle="--", label="judge")
    _draw(means, ranges, [row["proxy"] for row in rows])
    means.set(xlabel="reward of the judge, by quantile", ylabel="mean reward", title="rewards", ylim=_LIMITS)
    for ax in panels:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    means.legend(loc="upper left", fontsize=8, frameon=False)


def _draw_pairs(ax: Any, names: Sequence[str], changes: Sequence[Mapping[str, Any]]) -> None:
    ax.axhline(0.5, color=GREY, linewidth=0.8, linestyle="--", zorder=0)  # chance
    _draw(ax, names, changes)
    ax.set_ylim(*_LIMITS)
    ax.legend(loc="lower left", fontsize=8, frameon=False)


def _draw(ax: Any, names: Sequence[str], changes: Sequence[Mapping[str, Any]]) -> None:
    """A point with its interval for each name, before beside after; what is undefined is left out."""
    for key, shift, colour in (("before", -0.1, ORANGE), ("after", 0.1, BLUE)):
        shown = [(place, change[key]) for place, change in enumerate(changes) if change[key]["low"] is not None]
        value = np.array([one["value"] for _, one in shown])
        spread = [np.abs(value - [one[end] for _, one in shown]) for end in ("low", "high")]
        places = np.array([place for place, _ in shown]) + shift
        ax.errorbar(places, value, spread, fmt="o", color=colour, markersize=5, capsize=2, label=key)
    ax.set_xticks(range(len(names)), names)
    ax.set_xlim(-0.5, len(names) - 0.5)  # where nothing is defined, too
