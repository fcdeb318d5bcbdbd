"""What an RL run looks like: one self-contained HTML page, run.html in its folder, also while the run goes on.

Owns what is drawn and when it is written. What is told is `policy.run_digest`, several runs side by side
`policy.comparison`.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from policy.run_digest import (
    Estimated,
    Point,
    against_kl,
    best_row,
    criterion_curves,
    criterion_sides,
    first_alarm,
    furthest_pairs,
    gold_of,
    held_out,
    kl_spent,
    overrated,
    overrated_criteria,
    pairs_of,
    verdict,
)
from policy.run_folder import Row, Run, read_run
from policy.watching import DECLINE, DIVERGENCE
from rm import page
from rm.page import BLUE, INK, ORANGE, counted, legend, mark, number, signed, sparkline, svg, with_band
from rubric_data.files import write_text

logger = logging.getLogger(__name__)
PAGE = "run.html"
_SHARE = 0.05  # of a run's time that its page may take
_POINTS = 12  # of gold against KL
_MARKED = 30  # updates that are drawn as points; more would be a smear
_PAIRS = 6  # of responses, in each list
_ROLLOUTS = 8  # that the reward model overrates
_JUDGE = (0, (4, 2))  # the judge's line is dashed, as in the audit
_SMALL = {"width": 3.3, "height": 2.3}  # inches
_LISTS = (  # of pairs: title, what they are, and what they are sorted by
    ("Gained most", "The judge's reward rose most.", lambda pair: pair.gold),
    ("Lost most", "The judge's reward fell most.", lambda pair: -pair.gold),
    ("Parted most", "The model's reward rose most above the judge's.", lambda pair: pair.proxy - pair.gold),
)


class LivePage:
    """run.html of the run in ``folder``, written anew after its updates, in a twentieth of their time at most.

    A page that cannot be made is logged and ends no run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._due = -math.inf

    def refresh(self) -> float:
        """Write the page, unless the last one is too recent for what it took; returns the seconds it takes now."""
        begun = time.perf_counter()
        if begun < self._due:
            return 0.0
        try:
            write_page(self._folder)
        except Exception:
            logger.exception("%s: could not be written; the run goes on", self._folder / PAGE)
        took = time.perf_counter() - begun
        self._due = begun + took / _SHARE
        return took


def write_page(folder: Path) -> None:
    """Write run.html of the run in ``folder``. Raises UserError if there is no run, or no update of it."""
    write_text(folder / PAGE, render(read_run(folder)))


def render(run: Run) -> str:
    """The HTML page of ``run``. Whatever its texts hold is escaped."""
    pairs = pairs_of(run.samples)
    lists = [(title, about, furthest_pairs(pairs, by, _PAIRS)) for title, about, by in _LISTS]
    return page.render(
        "run.html.jinja",
        package="policy",
        run=run,
        name=run.folder.resolve().name,
        verdict=verdict(run),
        tiles=_tiles(run),
        facts=_facts(run),
        plots=_plots(run),
        curves=[(curve, sparkline(curve.values)) for curve in criterion_curves(run.rows)],
        sides=criterion_sides(run.rollouts),
        lists=[(title, about, shown) for title, about, shown in lists if shown],
        overrated=[(one, overrated_criteria(one)) for one in overrated(run.rollouts, _ROLLOUTS)],
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        command=" ".join(run.origin.get("command", [])),
        points=_POINTS,
    )


# --- tiles and facts -------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """A number to read first; ``estimate`` has bounds to be shown."""

    title: str
    value: str
    hint: str
    estimate: Estimated | None = None


def _tiles(run: Run) -> list[Tile]:
    tiles = _now(run) if run.result is None else _gains(run.result)
    tiles.append(Tile("KL spent", number(kl_spent(run), 2), "nats a response, from the starting policy"))
    alarms = [(kind, at) for kind in (DECLINE, DIVERGENCE) if (at := first_alarm(run.rows, kind)) is not None]
    none = ("none", f"in {counted(len(run.sure_looks), 'look')} of the judge")
    tiles.append(Tile("Alarm", *((alarms[0][0], f"at update {alarms[0][1]}") if alarms else none)))
    if best := best_row(run.rows):
        hint = f"the judge's reward of the rollouts about update {best['step']}"
        tiles.append(Tile("Best gold", number(best["reward/gold"]), hint, gold_of(best)))
    return tiles


def _gains(result: dict[str, Any]) -> list[Tile]:
    """What the policy gained on held-out prompts."""
    gold, proxy = result["gold_gain"], result["proxy_gain"]
    hint = f"the judge's reward on {held_out(result)}, after less before"
    return [
        Tile("Gold gained", signed(gold["value"]), hint, gold),
        Tile("Proxy gained", signed(proxy["value"]), "the same by the reward model", proxy),
    ]


def _now(run: Run) -> list[Tile]:
    """Where a run that goes on stands."""
    last, tiles = run.rows[-1], []
    if run.looks:
        look = run.looks[-1]
        hint = f"the judge's reward of update {look['step']}'s rollouts"
        tiles.append(Tile("Gold now", number(look["reward/gold"]), hint, gold_of(look)))
    hint = f"the reward model's reward of update {last['step']}'s rollouts"
    return [*tiles, Tile("Proxy now", number(last["reward/proxy"]), hint)]


def _facts(run: Run) -> list[tuple[str, str]]:
    """What the run was about, and what it took."""
    config, rows, result = run.config, run.rows, run.result or {}
    judge = config.get("judge")
    commit = run.origin.get("commit")
    counts = {key: sum(row.get(f"reward/{key}") or 0 for row in rows) for key in ("judged", "judge_failed", "masked")}
    found = {
        "trained by": run.method,
        "policy": config.get("policy"),
        "reward model": config.get("reward_model"),
        "judge": judge if judge == "verifier" else f"{judge} {config.get('judge_model')}",
        "data": config.get("data"),
        "updates": run.progress,
        "rollouts an update": config.get("batch_size"),
        "rollouts judged": counts["judged"],
        "drawn, but not answered": counts["judge_failed"] or None,
        "rollouts without a reward": counts["masked"] or None,
        "criteria": result.get("criteria"),
        "answered by code": result.get("criteria_by_code"),
        "seconds an update": number(float(np.median([row["seconds"] for row in rows])), 1),
        "seed": config.get("seed"),
        "commit": None if commit is None else commit[:10] + (", changed" if run.origin.get("dirty") else ""),
    }
    return [(name, str(value)) for name, value in found.items() if value is not None]


# --- plots -----------------------------------------------------------------------------------------------------------


def _plots(run: Run) -> dict[str, Markup]:
    """The plots by name; without those of a KL that nobody measured."""
    rows = run.rows
    plots = {
        "rewards": svg("rewards", partial(_draw_rewards, run), width=4.8),
        "tokens": svg("tokens", _curve(rows, "response_tokens", ylabel="tokens a response"), **_SMALL),
        "finished": svg("finished", _curve(rows, "finished_share", ylabel="share", ylim=(-0.03, 1.03)), **_SMALL),
    }
    if any(row["kl"] is not None for row in rows):
        plots["kl"] = svg("kl", _curve(rows, "kl", ylabel="nats a response"), **_SMALL)
    if points := against_kl(run.looks, _POINTS):
        plots["against"] = svg("against", partial(_draw_against_kl, points, run.result), width=4.8)
    return plots


def _draw_rewards(run: Run, ax: Axes) -> None:
    rows = run.rows
    if any(row.get("reward/paid") not in (None, row["reward/proxy"]) for row in rows):
        _draw_line(ax, rows, "reward/paid", ORANGE, (0, (1, 1)), "paid")
    _draw_line(ax, rows, "reward/proxy", BLUE, "-", "reward model")
    sure = run.sure_looks
    with_band(ax, [row["step"] for row in sure], [gold_of(row) for row in sure], INK, "none", "")
    _draw_line(ax, run.looks, "reward/gold", INK, _JUDGE, "judge")
    declined = first_alarm(rows, DECLINE)
    if declined is not None:
        mark(ax, declined, "gold declined")
    ax.set(xlabel="update", ylabel="mean reward of the rollouts")
    keep_to_rewards(ax)
    legend(ax, "best")


def _draw_against_kl(points: Sequence[Point], result: dict[str, Any] | None, ax: Axes) -> None:
    kl = [point.kl for point in points]
    proxy = [math.nan if point.proxy is None else point.proxy for point in points]
    ax.plot(kl, proxy, color=BLUE, marker="o", markersize=4, linewidth=1.4, label="reward model")
    draw_estimates(ax, kl, [point.gold for point in points], INK, "D", "judge", _JUDGE)
    if result is not None and None not in (result["kl_final"], result["gold_gain"]["value"]):
        ends = [result["gold_before"], result["gold_after"]]
        draw_estimates(ax, [0.0, result["kl_final"]], ends, ORANGE, "s", "judge, held-out prompts", "none")
    label_kl(ax, kl)
    ax.set(ylabel="mean reward")
    keep_to_rewards(ax)
    legend(ax, "best")


def label_kl(ax: Axes, kl: Sequence[float]) -> None:
    """A horizontal axis of ``kl`` that begins where the policy did."""
    ax.set(xlabel="KL from the starting policy, nats a response")
    ax.set_xlim(left=min(0.0, min(kl)) - 0.04 * max(0.0, max(kl)))


def keep_to_rewards(ax: Axes) -> None:
    """End the vertical axis where rewards end: the interval of a few judged prompts may go far beyond."""
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, -0.05), min(high, 1.05))


def draw_estimates(
    ax: Axes, x: Sequence[float], estimates: Sequence[Estimated], colour: str, marker: str, name: str, style: Any
) -> None:
    """Estimates with their intervals, joined by a line of ``style``."""
    for place, one in zip(x, estimates, strict=True):
        if one["low"] is not None:
            ax.plot([place, place], [one["low"], one["high"]], color=colour, linewidth=1.2, alpha=0.5)
    values = [one["value"] for one in estimates]
    ax.plot(x, values, color=colour, marker=marker, markersize=4, linewidth=1.4, linestyle=style, label=name)


def _curve(rows: Sequence[Row], key: str, **axes: Any) -> Callable[[Axes], None]:
    def draw(ax: Axes) -> None:
        _draw_line(ax, rows, key, BLUE, "-", "")
        ax.set(xlabel="update", **axes)

    return draw


def _draw_line(ax: Axes, rows: Sequence[Row], key: str, colour: str, style: Any, name: str) -> None:
    """A metric over the updates that have it."""
    known = [row for row in rows if row.get(key) is not None]
    steps, values = [row["step"] for row in known], [row[key] for row in known]
    marker = "o" if len(known) <= _MARKED else ""
    ax.plot(steps, values, color=colour, linestyle=style, linewidth=1.4, marker=marker, markersize=3, label=name)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
