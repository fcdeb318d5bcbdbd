"""What the HTML pages share: templates, the style of plots, numbers as text. Knows nothing of what they show.

A page asks nothing of the network: its style and its plots (SVG) are inline.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_CLIP = 4000  # characters of a prompt or response shown on a page
UNDEFINED = "–"

# Two hues told apart by readers of any colour vision, on white and on near-black alike; ink follows the page's text.
BLUE, ORANGE, GREY = "#2f81c7", "#d9662b", "#8a8f98"
INK = "#0a0b0c"  # replaced by currentColor once the plot is SVG
DASHED = (0, (3, 3))
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


def render(template: str, **shown: Any) -> str:
    """The page of ``template`` (a file of rm/templates). Whatever texts ``shown`` holds are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rm", "templates"),
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


def _bar(value: float | None) -> float:
    """Length of an AUROC's bar in per cent: none at chance, full at 1."""
    return 0.0 if value is None else round(100 * max(2 * value - 1, 0), 1)


def clip(text: str, most: int = _CLIP) -> str:
    """The first ``most`` characters of ``text``, and how many more there are."""
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most} more characters)"
