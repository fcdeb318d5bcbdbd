"""What a signal and noise panel looks like: one self-contained HTML page, and a table for the terminal.

Both read the panel's result alone (the content of snr.json); every number is made in `rm.panel`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.table import Table
from rich.text import Text

from rm import page
from rm.bench import TITLES
from rm.page import BLUE, COLOURS, DASHED, GREY, INK, MARKERS, ORANGE, percent, short, svg, with_interval

_SHOWN_DECISIONS = 4  # lines in one plot
_SHOWN_SLICES = 40  # rows of one table
_WAYS = {
    "single": "single checkpoints",
    "metric": "means of the metric",
    "scores": "means of the scores",
    "weights": "means of the weights",
}


def render(result: Mapping[str, Any]) -> str:
    """The HTML page of a panel's ``result``. Whatever its texts hold is escaped."""
    metrics = result["metrics"]
    ranked = ranking(metrics)
    best = result["recommendation"]["metric"] or ranked[0]
    plots = {
        "snr": svg("snr", lambda ax: _draw_ratios(ax, metrics, result["noise_floor"], best), width=5.6, height=3.4),
        "decision": svg("decision", lambda ax: _draw_decisions(ax, metrics, _drawn(ranked)), width=5.6, height=3.4),
    }
    for name in metrics:
        plots[name] = svg(f"curve-{name}", partial(_draw_curves, result, name), width=3.3, height=2.3)
    return page.render(
        "snr.html.jinja",
        panel=result,
        titles=TITLES,
        ranked=ranked,
        best=best,
        colours=[COLOURS[place % len(COLOURS)] for place in range(len(result["runs"]))],
        shown_slices=_SHOWN_SLICES,
        ways=_WAYS,
        plots=plots,
    )


def summary_table(result: Mapping[str, Any]) -> Table:
    """Signal, noise, their ratio and decisions by metric, for a terminal of 80 columns; the best ratio first."""
    title = f"{len(result['runs'])} recipes, last {result['last']} checkpoints, {result['prompts']} prompts"
    caption = (
        f"[low high]: {result['level']:.0%} interval, {result['bootstrap']} resamples of prompts. "
        f"Equal recipes stay below {result['noise_floor']:.1f} in {result['level']:.0%} of cases."
    )
    table = Table(title=title, caption=Text(caption), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("metric")
    for column in ("signal", "noise", "SNR", "decisions"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in ranking(result["metrics"]):
        one = result["metrics"][name]
        table.add_row(
            TITLES[name],
            percent(one["signal"]["value"]),
            percent(one["noise"]["value"]),
            with_interval(one["snr"], 2),
            short(one["decision"]["mean"]["value"], 2),
        )
    return table


def ranking(metrics: Mapping[str, Any]) -> list[str]:
    """Metrics by signal-to-noise ratio, the best first, undefined ones last."""
    return sorted(metrics, key=lambda name: -(metrics[name]["snr"]["value"] or 0))


def _drawn(ranked: Sequence[str]) -> list[str]:
    """The two best metrics, accuracy, and the worst."""
    return list(dict.fromkeys([*ranked[:2], "accuracy", ranked[-1]]))[:_SHOWN_DECISIONS]


# --- plots -----------------------------------------------------------------------------------------------------------


def _draw_ratios(ax: Axes, metrics: Mapping[str, Any], floor: float, best: str) -> None:
    names = [name for name in ranking(metrics) if metrics[name]["snr"]["value"] is not None]
    for height, name in enumerate(reversed(names)):
        one = metrics[name]["snr"]
        ax.barh(height, one["value"], height=0.62, color=BLUE if name == best else GREY, alpha=0.75)
        if one["low"] is not None:
            ax.plot([one["low"], one["high"]], [height, height], color=INK, linewidth=1.2)
        ax.annotate(f"{one['value']:.1f}", (1.02, height), xycoords=("axes fraction", "data"), va="center")
    ax.axvline(floor, color=ORANGE, linewidth=1, linestyle=DASHED)
    ax.set_yticks(range(len(names)), [TITLES[name] for name in reversed(names)])
    ax.set(ylim=(-0.6, len(names) - 0.4), xlabel="signal / noise")
    ax.set_xlim(left=0)
    ax.tick_params(axis="y", length=0)


def _draw_decisions(ax: Axes, metrics: Mapping[str, Any], names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        decision = metrics[name]["decision"]
        points = [(row["share"], row["accuracy"]["value"]) for row in decision["early"]] + [
            (1.0, decision["late"]["value"])
        ]
        points = [(share, value) for share, value in points if value is not None]
        # lines that fall together stay apart by a hair
        x, y = [share for share, _ in points], [value + 0.006 * place for _, value in points]
        ax.plot(x, y, color=COLOURS[place], marker=MARKERS[place], markersize=5, linewidth=1.4, label=TITLES[name])
    ax.axhline(0.5, color=GREY, linewidth=0.8, linestyle=DASHED, zorder=0)
    ax.set(xlabel="share of training", ylabel="decision accuracy", ylim=(-0.03, 1.06), xlim=(0, 1.04))
    ax.legend(loc="lower right")


def _draw_curves(result: Mapping[str, Any], name: str, ax: Axes) -> None:
    for place, (run, curve) in enumerate(zip(result["runs"], result["metrics"][name]["runs"], strict=True)):
        points = [(step, value) for step, value in zip(run["steps"], curve["values"], strict=True) if value is not None]
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        x, y = [step for step, _ in points], [value for _, value in points]
        ax.plot(x, y, color=colour, marker=marker, markersize=3, linewidth=1.2)
        if curve["mean"] is not None:
            span = run["steps"][-result["last"]], run["steps"][-1]
            ax.plot(span, [curve["mean"]] * 2, color=colour, linewidth=4, alpha=0.25)
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.set_title(TITLES[name], fontsize=10, loc="left")
