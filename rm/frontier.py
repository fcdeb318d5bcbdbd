"""What the judge's answers to a part of the criteria buy: cost against agreement, by which part is asked for.

Owns the frontier's arithmetic, its plot and the command `route`. Which verdicts come first is `rm.routing`; the
statistics are `rm.metrics`. Letters: B responses, K criteria (padded), N verdicts that the judge gave, P prompts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table as TextTable

from rm import metrics
from rm.config import RouteConfig
from rm.page import BLUE, GREY, ORANGE, percent, with_interval
from rm.routing import choose, values, widths
from rm.sides import Table, pair_sets, require_unmasked
from rubric_data.arrays import JudgedArrays
from rubric_data.errors import UserError
from rubric_data.files import atomic_path, json_number, start_run, write_json
from rubric_data.records import JudgedResponse
from rubric_data.split import of_split

if TYPE_CHECKING:
    from rm.scorer import Scored

FILE, PLOT = "route.json", "route.png"
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)  # of the verdicts that the judge is asked for
RANDOM, WIDTH, VALUE = "random", "width", "value"  # the rules that are compared
_COLOURS = {RANDOM: GREY, WIDTH: ORANGE, VALUE: BLUE}
_TITLES = {
    "pair_accuracy": "pair accuracy",
    "tail_pair_accuracy": "pair accuracy in the tail",
    "reward_mae": "mean error of the reward",
}

Statistics = dict[str, metrics.Ratio]


def run_route(config: RouteConfig) -> dict[str, Any]:
    """Measure the frontier of a model on judged responses; write route.json and route.png, print a table.

    The model answers every criterion, those with a verifier too, and the judge's verdicts are those of the file. Raises
    UserError on bad input.
    """
    from rm.data import load_judged  # here, for these bring torch, which the arithmetic does without
    from rm.scorer import RubricScorer

    if not 0 < config.tail <= 1:
        raise UserError(f"tail: must lie in (0, 1], got {config.tail}; 0.25 is each prompt's top quarter")
    for name in ("draws", "bootstrap"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}: must be at least 1, got {getattr(config, name)}; raise it")
    records = of_split(load_judged(config.data), config.split)
    require_unmasked("route", records)
    scorer = RubricScorer.from_pretrained(config.model, tokens_per_batch=config.tokens_per_batch, use_verifiers=False)
    folder = start_run(config.output, asdict(config))
    scored = scorer.score_records(records, progress=True)
    found = frontier(
        records, scored, tail=config.tail, draws=config.draws, bootstrap=config.bootstrap, seed=config.seed
    )
    report = {
        "model": config.model,
        "data": config.data,
        "split": config.split,
        "intervals": "conformal" if scorer.calibration.reward_level is not None else "two standard deviations",
        **found,
    }
    write_json(folder / FILE, report)
    plot(folder / PLOT, report["rules"])
    console = Console()
    console.print(text_table(report))
    console.print(f"plot: {folder / PLOT}", soft_wrap=True, markup=False)
    return report


def frontier(
    records: Sequence[JudgedResponse],
    scored: "Sequence[Scored]",
    *,
    tail: float,
    draws: int,
    bootstrap: int,
    seed: int,
    shares: Sequence[float] = SHARES,
) -> dict[str, Any]:
    """Agreement of the rewards with the judge's once it gave a share of the verdicts, as JSON-able values.

    Three rules say which: at random (the mean over ``draws`` orders), the widest answers first, the most valuable
    first, each over all the responses together. docs/metrics.md (route.json) has every key. All intervals come from the
    same resamples of prompts; differences to random choice are paired.
    """
    arrays, table = JudgedArrays.of(records), Table.of(records)
    counts_RP = table.resamples(bootstrap, seed)
    places = np.flatnonzero(~np.isnan(arrays.value_BK))
    answers = _Answers.of(records, scored, arrays)
    orders = {rule: answers.order(worth_N) for rule, worth_N in ((WIDTH, answers.width_N), (VALUE, answers.value_N))}
    chance = np.random.default_rng(seed)
    drawn = [chance.permutation(len(places)) for _ in range(draws)]
    pairs = dict(zip(("pair_accuracy", "tail_pair_accuracy"), pair_sets(table, tail), strict=True))

    def statistics(asked: np.ndarray) -> Statistics:
        filled = answers.prob_BK.copy()
        filled.flat[places[asked]] = arrays.value_BK.flat[places[asked]]
        reward_B = arrays.rewards(filled)[table.rewarded_B]
        sides = table.reward_B, reward_B, table.prompt_B, table.prompts
        found = {key: metrics.pair_accuracy(*sides, own, "half") for key, own in pairs.items()}
        error_B = np.abs(reward_B - table.reward_B)
        return found | {"reward_mae": metrics.mean(error_B, table.prompt_B, table.prompts)}

    rules: dict[str, list[dict[str, Any]]] = {rule: [] for rule in (RANDOM, *orders)}
    for share in shares:
        asked = round(share * len(places))
        by_chance = _mean([statistics(order[:asked]) for order in drawn])
        rules[RANDOM].append(_row(share, asked, by_chance, counts_RP))
        for rule, order in orders.items():
            own = statistics(order[:asked])
            narrowest = answers.width_N[order[:asked]].min() if asked else np.nan
            minus = {key: metrics.difference(own[key], by_chance[key], counts_RP).as_dict() for key in own}
            rules[rule].append(
                _row(share, asked, own, counts_RP) | {"narrowest": json_number(float(narrowest)), "minus_random": minus}
            )
    return {
        "prompts": table.prompts,
        "responses": len(records),
        "verdicts": len(places),
        "pairs": {key: int(statistics(drawn[0][:0])[key].count_P.sum()) for key in pairs},
        "tail": tail,
        "draws": draws,
        "bootstrap": bootstrap,
        "seed": seed,
        "rules": rules,
    }


@dataclass(frozen=True)
class _Answers:
    """The model's answers to what the judge answered, NaN elsewhere; and of these N their widths and values."""

    prob_BK: np.ndarray
    width_N: np.ndarray
    value_N: np.ndarray

    @property
    def prob_N(self) -> np.ndarray:
        return self.prob_BK[~np.isnan(self.prob_BK)]

    @classmethod
    def of(cls, records: Sequence[JudgedResponse], scored: "Sequence[Scored]", arrays: JudgedArrays) -> Self:
        prob_BK = np.full(arrays.value_BK.shape, np.nan)
        width, value = [], []
        for row, (record, one) in enumerate(zip(records, scored, strict=True)):
            known_K = ~np.isnan(record.values())
            # a criterion that the judge did not answer has no part in either reward
            prob_BK[row, : len(known_K)] = probs_K = np.where(known_K, one.probs, np.nan)
            width_K = widths(one)
            width.append(width_K[known_K])
            value.append(values(record.rubric, probs_K, width_K)[known_K])
        return cls(prob_BK, np.concatenate(width), np.concatenate(value))

    def order(self, worth_N: np.ndarray) -> np.ndarray:
        """All N, as `choose` puts them by ``worth``; what is worth nothing comes last."""
        chosen = choose(worth_N, self.width_N, self.prob_N, budget=len(worth_N))
        return np.append(chosen, np.setdiff1d(np.arange(len(worth_N)), chosen))


def _mean(found: Sequence[Statistics]) -> Statistics:
    """The mean of each statistic over draws, which all count the same pairs and responses."""
    return {
        key: metrics.Ratio(np.mean([one[key].total_P for one in found], axis=0), found[0][key].count_P)
        for key in found[0]
    }


def _row(share: float, asked: int, found: Statistics, counts_RP: np.ndarray) -> dict[str, Any]:
    estimates = {key: metrics.estimate(statistic, counts_RP).as_dict() for key, statistic in found.items()}
    return {"share": share, "asked": asked, **estimates}


# --- what it looks like ----------------------------------------------------------------------------------------------


def text_table(report: Mapping[str, Any]) -> TextTable:
    """All three rules at every share, for a terminal of 80 columns."""
    title = f"Agreement with the judge, by share of {report['verdicts']} verdicts asked for"
    caption = f"{report['prompts']} prompts, {report['responses']} responses; random: mean of {report['draws']} draws"
    table = TextTable(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("asked", "first", "pairs [95 %]", "tail pairs", "reward error"):
        table.add_column(column, justify="left" if column == "first" else "right", no_wrap=True)
    for rows in zip(*report["rules"].values(), strict=True):
        for rule, row in _different(dict(zip(report["rules"], rows, strict=True))):
            table.add_row(percent(row["share"]), rule, *(with_interval(row[key]) for key in _TITLES))
    return table


def _different(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a share by rule, but one where all rules ask the same: for nothing, or for everything."""
    if next(iter(rows.values()))["share"] in (0, 1):
        yield "–", next(iter(rows.values()))
    else:
        yield from rows.items()


def plot(path: str | Path, rules: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Each measure of agreement against the share of verdicts asked for, a line with its interval for each rule."""
    from matplotlib.figure import Figure  # not pyplot: it would choose a window system

    figure = Figure(figsize=(12.6, 3.9), layout="constrained")
    for ax, (key, title) in zip(figure.subplots(1, len(_TITLES)), _TITLES.items(), strict=True):
        for rule, rows in rules.items():
            share = [row["share"] for row in rows]
            middle, low, high = (
                [np.nan if row[key][end] is None else row[key][end] for row in rows] for end in ("value", "low", "high")
            )
            ax.plot(share, middle, marker="o", markersize=3, color=_COLOURS[rule], label=rule)
            if rule != WIDTH:  # three bands would hide each other
                ax.fill_between(share, low, high, color=_COLOURS[rule], alpha=0.15, linewidth=0)
        ax.set(xlabel="share of the verdicts asked for", title=title)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
    figure.axes[0].legend(loc="lower right", frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
