"""What an audit looks like: one self-contained HTML page, and a table for the terminal.

Both read the audit's result alone (the content of audit.json); every number is made in `rm.audit`.
The page asks nothing of the network: its style and its plots (SVG) are inline.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

_MODEL, _RAW = "model", "model (raw)"
_CLIP = 4000  # characters of a prompt or response shown on the page
_UNDEFINED = "–"
_CRITERIA, _LEAST_VERDICTS = 15, 10  # criteria shown on the page, and verdicts that one needs for it

# Two hues told apart by readers of any colour vision, on white and on near-black alike; ink follows the page's text.
_BLUE, _ORANGE, _GREY = "#2f81c7", "#d9662b", "#8a8f98"
_INK = "#0a0b0c"  # replaced by currentColor once the plot is SVG
_STYLE = {
    "svg.fonttype": "none",  # text stays text: searchable, in the page's font
    "svg.hashsalt": "rubric-rm",  # the same audit gives the same page
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
}

_HEADLINES = (
    ("Criterion AUROC", "criterion", "auroc", "a met verdict scored above an unmet one; chance is 0.5"),
    ("Criterion accuracy", "criterion", "accuracy", "on the judge's side of 0.5"),
    ("Pair accuracy", "reward", "pair_accuracy", "responses to one prompt put in the judge's order; chance is 0.5"),
    ("Pair accuracy in the tail", "reward", "tail_pair_accuracy", "the same, among the judge's favourites"),
)


def render(result: dict[str, Any]) -> str:
    """The HTML page of an audit ``result``. Whatever its texts hold is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rm", "templates"),
        autoescape=True,  # always: the default goes by suffix and would pass .jinja unescaped
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "percent": _percent, "signed": _signed, "clip": _clip, "bar": _bar}
    predictors = result["predictors"]
    best = _strongest_baseline(predictors)
    return environment.get_template("audit.html.jinja").render(
        audit=result,
        model=predictors[_MODEL],
        best=best,
        criteria=[(_clip(row["criterion"], 200), row) for row in _worst_criteria(result["by_criterion"])],
        regrets={n: found for n, found in result["selection"]["regret"].items() if found["prompts"]},
        lengths=[(f"{row['low']} to {row['high']}", row) for row in result["by_length"]],
        novelty=[(f"{of}, {side}", row) for of, sides in result["by_novelty"].items() for side, row in sides.items()],
        headlines=[(title, _get(predictors[_MODEL], kind, key), hint) for title, kind, key, hint in _HEADLINES],
        plots={
            "auroc": _svg(
                "auroc", lambda ax: _draw_forest(ax, predictors, "criterion", "auroc"), width=4.8, height=2.6
            ),
            "tail": _svg(
                "tail", lambda ax: _draw_forest(ax, predictors, "reward", "tail_pair_accuracy"), width=4.8, height=2.6
            ),
            "reliability": _svg("reliability", lambda ax: _draw_reliability(ax, predictors, "reliability")),
            "width": _svg("width", lambda ax: _draw_reliability(ax, predictors, "reliability_by_width")),
            "rewards": _svg("rewards", lambda ax: _draw_rewards(ax, predictors)),
            "pairs": _svg("pairs", lambda ax: _draw_pairs(ax, predictors[_MODEL]["reward"]["by_quantile"])),
            "tops": _svg("tops", lambda ax: _draw_tops(ax, predictors)),
            "regret": _svg("regret", lambda ax: _draw_regret(ax, result, best[0] if best else None)),
            "edits": _svg("edits", lambda ax: _draw_edits(ax, result["artefacts"]["edits"]), width=4.8, height=2.6)
            if "artefacts" in result
            else "",
        },
    )


def summary_table(result: dict[str, Any]) -> Table:
    """The headline numbers of every predictor, for a terminal of 80 columns."""
    title = f"{result['prompts']} prompts, {result['responses']} responses, {result['verdicts']} verdicts"
    if result["masked"]:
        title += f" ({result['masked']} masked)"
    caption = f"[low high]: {result['level']:.0%} interval, {result['bootstrap']} resamples of prompts"
    table = Table(title=title, caption=Text(caption), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("predictor")
    for column in ("accuracy", "AUROC", "Brier", "Spearman", "tail pair acc."):
        table.add_column(column, justify="right", no_wrap=True)
    for name, one in result["predictors"].items():
        table.add_row(
            Text(name, style="bold" if name == _MODEL else ""),
            Text(_short(one["criterion"]["accuracy"]["value"], 3)),
            Text(_with_interval(one["criterion"]["auroc"])),
            Text(_short(one["criterion"]["brier"]["value"], 3)),
            Text(_short(one["reward"]["spearman"]["value"], 3)),
            Text(_with_interval(one["reward"]["tail_pair_accuracy"]["half"])),
        )
    return table


def _get(predictor: dict[str, Any], kind: str, key: str) -> dict[str, Any]:
    """One estimate; of a pair accuracy, the one where predicted ties count half."""
    found = predictor[kind][key]
    return found.get("half", found)


def _strongest_baseline(predictors: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The name and AUROC of the predictor, other than the model, with the highest defined AUROC."""
    rivals = {
        name: one["criterion"]["auroc"]
        for name, one in predictors.items()
        if name not in (_MODEL, _RAW) and one["criterion"]["auroc"]["value"] is not None
    }
    return max(rivals.items(), key=lambda item: item[1]["value"]) if rivals else None


def _worst_criteria(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The criteria with the lowest AUROC, among those with enough verdicts to have one worth looking at."""
    known = [row for row in rows if row["auroc"]["value"] is not None and row["verdicts"] >= _LEAST_VERDICTS]
    return sorted(known, key=lambda row: row["auroc"]["value"])[:_CRITERIA]


def artefact_table(result: dict[str, Any]) -> Table:
    """What the edits and the rubric swap did, for a terminal of 80 columns."""
    found = result["artefacts"]
    caption = _swap_line(found["swap"]) if found["swap"] else "no rubric swap: all responses have the same rubric"
    layout: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
    table = Table(title="edits that make no response better", caption=Text(caption), **layout)
    table.add_column("edit")
    for column in ("proxy", "gold", "proxy rises", "exploited"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in found["edits"].items():
        judged = row["judged"]
        gold, exploited = (judged["gold_change"], judged["exploited"]) if judged else (None, None)
        cells = (_with_interval(row["proxy_change"], signed=True), _with_interval(gold, signed=True))
        shares = (_percent(row["raised"]["value"]), _percent(exploited["value"] if exploited else None))
        table.add_row(Text(name), *map(Text, (*cells, *shares)))
    return table


def _swap_line(swap: dict[str, Any]) -> str:
    line = f"under another rubric the proxy goes from {_short(swap['proxy_own']['value'], 3)}"
    line += f" to {_short(swap['proxy_swapped']['value'], 3)}"
    if judged := swap["judged"]:
        line += f", gold from {_short(judged['gold_own']['value'], 3)}"
        line += f" to {_short(judged['gold_swapped']['value'], 3)};"
        line += f" where gold moves the proxy follows on {_percent(judged['follows']['value'])}"
    return line


# --- plots -----------------------------------------------------------------------------------------------------------


def _svg(name: str, draw: Callable[[Axes], None], *, width: float = 3.7, height: float = 3.3) -> Markup:
    """What ``draw`` draws, as inline SVG: scales with the page, takes its ink from the text colour. Size in inches."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # ids must be unique on the page, and every plot has its own figure_1
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return Markup(svg)


def _draw_forest(ax: Axes, predictors: dict[str, Any], kind: str, key: str) -> None:
    names = [name for name, one in predictors.items() if _get(one, kind, key)["value"] is not None]
    for height, name in enumerate(reversed(names)):
        one = _get(predictors[name], kind, key)
        colour = _BLUE if name == _MODEL else _ORANGE if name == _RAW else _GREY
        if one["low"] is not None:
            ax.plot([one["low"], one["high"]], [height, height], color=colour, linewidth=2, solid_capstyle="round")
        ax.plot(one["value"], height, "o", color=colour, markersize=6)
        ax.annotate(f"{one['value']:.3f}", (1.02, height), xycoords=("axes fraction", "data"), va="center")
    ax.axvline(0.5, color=_GREY, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
    ax.set_yticks(range(len(names)), list(reversed(names)))
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def _draw_reliability(ax: Axes, predictors: dict[str, Any], key: str) -> None:
    _diagonal(ax)
    for name, colour, marker in ((_RAW, _ORANGE, "s"), (_MODEL, _BLUE, "o")):
        if name in predictors:
            points = predictors[name]["criterion"][key]
            places = np.array([point["predicted"]["value"] for point in points])
            _with_bars(ax, places, [point["judged"] for point in points], colour, marker, name)
    ax.set(xlabel="mean predicted probability", ylabel="mean verdict of the judge")
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    ax.legend(loc="upper left")


def _draw_rewards(ax: Axes, predictors: dict[str, Any]) -> None:
    rows = predictors[_MODEL]["reward"]["by_quantile"]
    places = np.arange(len(rows))
    gold = [row["gold"]["value"] for row in rows]
    ax.plot(places, gold, color=_INK, marker="D", markersize=5, linewidth=1.2, linestyle=(0, (4, 2)), label="judge")
    for name, colour, marker, shift in ((_RAW, _ORANGE, "s", 0.06), (_MODEL, _BLUE, "o", -0.06)):
        if name in predictors:
            found = predictors[name]["reward"]["by_quantile"]
            _with_bars(ax, places + shift, [row["proxy"] for row in found], colour, marker, name)
    _bin_axis(ax, rows)
    ax.set(ylabel="mean reward", ylim=(-0.03, 1.03))
    ax.legend(loc="upper left")


def _draw_pairs(ax: Axes, rows: Sequence[dict[str, Any]]) -> None:
    ax.axhline(0.5, color=_GREY, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
    defined = [
        (place, row["pair_accuracy"]) for place, row in enumerate(rows) if row["pair_accuracy"]["value"] is not None
    ]
    _with_bars(
        ax, np.array([place for place, _ in defined]), [one for _, one in defined], _BLUE, "o", _MODEL, line=False
    )
    for place, row in enumerate(rows):
        ax.annotate(f"{row['pairs']} pairs", (place, 0.02), ha="center", va="bottom", fontsize=7, color=_GREY)
    _bin_axis(ax, rows)
    ax.set(ylabel="pair accuracy", ylim=(0, 1.03))


def _draw_tops(ax: Axes, predictors: dict[str, Any]) -> None:
    ax.axhline(0.5, color=_GREY, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
    tops = list(predictors[_MODEL]["reward"]["top_pair_accuracy"])
    for name, colour, marker, shift in ((_RAW, _ORANGE, "s", 0.06), (_MODEL, _BLUE, "o", -0.06)):
        if name in predictors:
            reward = predictors[name]["reward"]
            found = [*(reward["top_pair_accuracy"][top]["half"] for top in tops), reward["pair_accuracy"]["half"]]
            _with_defined(ax, np.arange(len(found)) + shift, found, colour, marker, name)
    ax.set_xticks(range(len(tops) + 1), [*(f"top {top}" for top in tops), "all"])
    ax.set(ylabel="pair accuracy", ylim=(0, 1.03), xlim=(-0.5, len(tops) + 0.5))
    _legend(ax, "lower right")


def _draw_regret(ax: Axes, result: dict[str, Any], baseline: str | None) -> None:
    by_chance = {n: row["by_chance"] for n, row in result["selection"]["regret"].items() if row["prompts"]}
    rows = [("by chance", by_chance, _GREY, ".", 0.0)]
    for name, colour, marker, shift in ((baseline, _ORANGE, "s", 0.05), (_MODEL, _BLUE, "o", -0.05)):
        if name is not None:
            rows.append((name, result["predictors"][name]["reward"]["regret"], colour, marker, shift))
    for name, found, colour, marker, shift in rows:
        _with_defined(ax, np.arange(len(by_chance)) + shift, [found[n] for n in by_chance], colour, marker, name)
    ax.set_xticks(range(len(by_chance)), list(by_chance))
    ax.set(xlabel="best of n", ylabel="judge's reward lost", xlim=(-0.5, len(by_chance) - 0.5))
    ax.set_ylim(bottom=0)
    _legend(ax, "upper left")


def _draw_edits(ax: Axes, edits: dict[str, Any]) -> None:
    ax.axvline(0, color=_GREY, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
    for height, row in enumerate(reversed(edits.values())):
        sides = [("model", row["proxy_change"], _BLUE, "o", 0.12)]
        if row["judged"]:
            sides = [
                ("model", row["judged"]["proxy_change"], _BLUE, "o", 0.12),
                ("judge", row["judged"]["gold_change"], _INK, "D", -0.12),
            ]
        for name, one, colour, marker, shift in sides:
            if one["low"] is not None:
                ax.plot([one["low"], one["high"]], [height + shift] * 2, color=colour, linewidth=1.6, alpha=0.7)
            ax.plot(one["value"], height + shift, marker, color=colour, markersize=5, label=None if height else name)
    ax.set_yticks(range(len(edits)), list(reversed(edits)))
    ax.set(xlabel="change of the mean reward", ylim=(-0.6, len(edits) - 0.4))
    ax.tick_params(axis="y", length=0)
    _legend(ax, "best")


def _with_defined(
    ax: Axes, x: np.ndarray, estimates: Sequence[dict[str, Any]], colour: str, marker: str, name: str
) -> None:
    """`_with_bars` of what is defined."""
    defined = [place for place, one in enumerate(estimates) if one["value"] is not None]
    _with_bars(ax, x[defined], [estimates[place] for place in defined], colour, marker, name)


def _legend(ax: Axes, place: str) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc=place)


def _with_bars(
    ax: Axes, x: np.ndarray, estimates: Sequence[dict[str, Any]], colour: str, marker: str, name: str, line: bool = True
) -> None:
    for place, one in zip(x, estimates, strict=True):
        if one["low"] is not None:
            ax.plot([place, place], [one["low"], one["high"]], color=colour, linewidth=1.4, alpha=0.6)
    style = "-" if line else "none"
    ax.plot(
        x, [one["value"] for one in estimates], color=colour, marker=marker, markersize=5, linestyle=style, label=name
    )


def _bin_axis(ax: Axes, rows: Sequence[dict[str, Any]]) -> None:
    def span(row: dict[str, Any]) -> str:
        low, high = _short(row["low"], 2), _short(row["high"], 2)
        return low if low == high else f"{low}–{high}"

    ax.set_xticks(range(len(rows)), [span(row) for row in rows], fontsize=8)
    ax.set(xlabel="reward given by the judge", xlim=(-0.5, len(rows) - 0.5))


def _diagonal(ax: Axes) -> None:
    ax.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)


# --- numbers as text -------------------------------------------------------------------------------------------------


def _number(value: float | None, digits: int = 3) -> str:
    return _UNDEFINED if value is None else f"{value:.{digits}f}".replace("-", "−")


def _signed(value: float | None, digits: int = 3) -> str:
    return _UNDEFINED if value is None else f"{value:+.{digits}f}".replace("-", "−")


def _percent(value: float | None) -> str:
    return _UNDEFINED if value is None else f"{100 * value:.3g}%"


def _bar(value: float | None) -> float:
    """Length of an AUROC's bar in per cent: none at chance, full at 1."""
    return 0.0 if value is None else round(100 * max(2 * value - 1, 0), 1)


def _clip(text: str, most: int = _CLIP) -> str:
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most} more characters)"


def _short(value: float | None, digits: int, signed: bool = False) -> str:
    """``value`` without its leading zero."""
    sign = "+" if signed else ""
    return _UNDEFINED if value is None else re.sub(r"^([-+]?)0\.", r"\1.", f"{value:{sign}.{digits}f}")


def _with_interval(one: dict[str, Any] | None, *, signed: bool = False) -> str:
    """'.853 [.81 .89]'; a dash where undefined, no interval where that is."""
    if one is None or one["low"] is None:
        return _short(one["value"] if one else None, 3, signed)
    return f"{_short(one['value'], 3, signed)} [{_short(one['low'], 2, signed)} {_short(one['high'], 2, signed)}]"
