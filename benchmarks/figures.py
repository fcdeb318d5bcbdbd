"""Draw the figures of docs/experiments.md from the records of the experiments.

python -m benchmarks.figures        every figure whose record is there
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.record import RESULTS, ROOT
from rm.page import BLUE, ORANGE

FOLDER = ROOT / "docs" / "figures"
SMOOTH = 4  # updates in a running mean

Record = dict[str, Any]


def running_mean(values: Sequence[float], width: int = SMOOTH) -> np.ndarray:
    """Means over each ``width`` neighbours, (len - width + 1,)."""
    return np.convolve(np.asarray(values, float), np.ones(width) / width, "valid")


def planted_exploit(record: Record) -> Figure:
    """Share of rollouts with the mark, and gold of the rollouts, by update: seeds thin, their mean thick."""
    figure = Figure(figsize=(8.4, 3.2), layout="constrained", facecolor="white")
    panels = {"mark_by_update": "share of rollouts with the mark", "gold_by_update": "gold without the vetoes"}
    for ax, (key, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for name, colour in (("undefended", ORANGE), ("defended", BLUE)):
            _lines(ax, [running_mean(seed[name][key]) for seed in record["seeds"].values()], colour, name)
        ax.set(xlabel=f"update (means over {SMOOTH})", ylabel=label, ylim=(0, 1))
        ax.legend(frameon=False)
    return figure


def _lines(ax: Axes, curves: Sequence[np.ndarray], colour: str, name: str) -> None:
    x = np.arange(len(curves[0])) + SMOOTH
    for curve in curves:
        ax.plot(x, curve, color=colour, linewidth=0.8, alpha=0.4)
    ax.plot(x, np.mean(curves, axis=0), color=colour, linewidth=2, label=name)


FIGURES: dict[str, Callable[[Record], Figure]] = {"planted-exploit": planted_exploit}


def draw(folder: Path = FOLDER, results: Path = RESULTS) -> list[Path]:
    """Draw every figure whose record is in ``results`` into ``folder``; returns what was drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, figure in FIGURES.items():
        if (results / f"{name}.json").exists():
            record = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
            figure(record).savefig(folder / f"{name}.png", dpi=130, metadata={"Software": None})
            drawn.append(folder / f"{name}.png")
    return drawn


if __name__ == "__main__":
    for path in draw():
        print(path.relative_to(ROOT))
