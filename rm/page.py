"""What the HTML pages share: templates, the style of plots, numbers as text. Knows nothing of what they show.

A page asks nothing of the network: its style and its plots (SVG) are inline.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_CLIP = 4000  # characters of a prompt or response shown on a page
UNDEFINED = "–"

# Two hues told apart by readers of any colour vision, on white and on near-black alike; ink follows the page's text.
BLUE, ORANGE, GREY = "#2f81c7", "#d9662b", "#8a8f98"
INK = "#0a0b0c"  # replaced by currentColor once the plot is SVG
DASHED = (0, (3, 3))
COLOURS = (BLUE, ORANGE, "#3a9b62", "#9a63c4", "#b8860b", "#c4506f", "#2b9aa8", GREY)  # of several of a kind
MARKERS = "osD^vPX*"
_NAME = 28  # characters of a name in a plot
_SPARKS, _SPARK_HEIGHT = 100, 24  # of a sparkline: points, and its height where its width is 100
_STYLE = {
    "svg.fonttype": "none",  # text stays text: searchable, in the page's font
    "svg.hashsalt": "rubric-rm",  # the same numbers give the same page
    "font.size": 10,
    "text.parse_math": False,  # names are shown as they are, dollars too
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def render(template: str, *, package: str = "rm", **shown: Any) -> str:
    """The page of ``template``, a file in the templates/ of ``package``. Whatever texts ``shown`` holds are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in dict.fromkeys((package, "rm"))]),
        autoescape=True,  # always: the default goes by suffix and would pass .jinja unescaped
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "signed": signed, "clip": clip, "bar": _bar}
    return environment.get_template(template).render(**shown)


def svg(name: str, draw: Callable[[Axes], None], *, width: float = 3.7, height: float = 3.3) -> Markup:
    """What ``draw`` draws, as inline SVG: scales with the page, takes its ink from the text colour. Size in inches."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # a letter that is not in this font is drawn by the reader's browser, in another
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # ids must be unique on the page, and every plot has its own figure_1
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return Markup(text)


def sparkline(values: Sequence[float], low: float = 0.0, high: float = 1.0) -> Markup:
    """A line of the size of a word, from left to right; ``low`` is at its foot and ``high`` at its top.

    Many values are averaged over neighbours down to `_SPARKS` points.
    """
    parts = np.array_split(np.asarray(values, float), min(_SPARKS, len(values)))
    heights = [_SPARK_HEIGHT * (1 - (float(part.mean()) - low) / (high - low)) for part in parts]
    places = np.linspace(0, 100, len(parts)) if len(parts) > 1 else [0]
    points = " ".join(f"{place:.1f},{height:.1f}" for place, height in zip(places, heights, strict=True))
    points += f" 100,{heights[-1]:.1f}" if len(parts) == 1 else ""  # a single value is a level line
    box = f'viewBox="0 -1 100 {_SPARK_HEIGHT + 2}" preserveAspectRatio="none"'
    line = f'<polyline points="{points}" vector-effect="non-scaling-stroke"/>'
    return Markup(f'<svg class="spark" {box} aria-hidden="true">{line}</svg>')  # numbers alone: nothing to escape


# --- what plots have in common ---------------------------------------------------------------------------------------


def with_band(
    ax: Axes, x: Sequence[float], estimates: Sequence[Mapping[str, Any]], colour: str, style: Any, name: str
) -> None:
    """A line of estimates; between their bounds a band, if all have some."""
    ax.plot(x, [one["value"] for one in estimates], color=colour, linestyle=style, linewidth=1.4, label=name)
    if all(one["low"] is not None for one in estimates):
        low, high = [one["low"] for one in estimates], [one["high"] for one in estimates]
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def legend(ax: Axes, place: str) -> None:
    """A legend, if anything that is drawn has a name."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc=place)


def mark(ax: Axes, x: float, text: str) -> None:
    """A vertical line at ``x``, named at its foot on the side that has more room."""
    ax.axvline(x, color=ORANGE, linewidth=1)
    left = x > sum(ax.get_xlim()) / 2
    at: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    at |= {"xytext": (-3 if left else 3, 0), "ha": "right" if left else "left"}
    ax.annotate(text, (x, 0.01), fontsize=8, color=ORANGE, **at)


def cut(name: str) -> str:
    """A name as a plot has room for it."""
    shown = name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"
    return f" {shown}" if shown.startswith("_") else shown  # a legend passes over labels that begin so


# --- numbers as text -------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with so many decimals, or a dash where undefined."""
    return UNDEFINED if value is None else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """``value`` with its sign."""
    return UNDEFINED if value is None else f"{value:+.{digits}f}".replace("-", "−")


def percent(value: float | None) -> str:
    """A share in per cent."""
    return UNDEFINED if value is None else f"{100 * value:.3g}%"


def short(value: float | None, digits: int, *, signed: bool = False) -> str:
    """``value`` without its leading zero."""
    sign = "+" if signed else ""
    return UNDEFINED if value is None else re.sub(r"^([-+]?)0\.", r"\1.", f"{value:{sign}.{digits}f}")


def with_interval(one: Mapping[str, float | None] | None, digits: int = 3, *, signed: bool = False) -> str:
    """An estimate as ``value [low high]``; its bounds have a decimal less. A dash where there is none."""
    if one is None:
        return UNDEFINED
    if one["low"] is None:
        return short(one["value"], digits, signed=signed)
    low, high = (short(one[end], digits - 1, signed=signed) for end in ("low", "high"))
    return f"{short(one['value'], digits, signed=signed)} [{low} {high}]"


def signed_interval(one: Mapping[str, float | None]) -> str:
    """A difference as ``+0.046 [+0.012, +0.080]``, or without bounds where it has none."""
    ends = "" if one["low"] is None else f" [{signed(one['low'])}, {signed(one['high'])}]"
    return f"{signed(one['value'])}{ends}"


def side(gap: Mapping[str, float | None], lower_is_better: bool = False) -> str:
    """Whether a difference says "ahead" or "behind"; "" where its interval holds zero, or there is none."""
    low, high = gap["low"], gap["high"]
    if low is None or high is None or low <= 0 <= high:
        return ""
    return "ahead" if (low > 0) != lower_is_better else "behind"


def counted(count: int, noun: str) -> str:
    """``1 look``, ``2 looks``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listed(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]


def _bar(value: float | None) -> float:
    """Length of an AUROC's bar in per cent: none at chance, full at 1."""
    return 0.0 if value is None else round(100 * max(2 * value - 1, 0), 1)


def clip(text: str, most: int = _CLIP) -> str:
    """The first ``most`` characters of ``text``, and how many more there are."""
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most} more characters)"
