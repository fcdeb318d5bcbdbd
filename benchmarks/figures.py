"""Draw the figures of docs/experiments.md from the records of the experiments.

python -m benchmarks.figures        every figure whose records are there
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.record import RESULTS, ROOT, running_mean
from rm.page import BLUE, GREY, ORANGE

FOLDER = ROOT / "docs" / "figures"
SMOOTH = 4  # updates in a running mean
# what is learnt of each data set: the record, and the AUROC aimed at
LEARNT = {
    "realsumm": ("distil-realsumm-tail", 0.90),
    "mrbench": ("distil-mrbench-tail", 0.78),
    "hellobench": ("distil-hellobench", 0.83),
    "structflow": ("distil-structflow", 0.80),
}
IN_FULL = ("hellobench",)  # whose aim asks for verdicts met in full, not above a half
GREEN, RED = "#2a9d5c", "#c0392b"
REWARDS = {"gold": "black", "tail": BLUE, "base": ORANGE, "off_policy": RED, "bt": GREEN}
_OURS = ("model", "tail", "model (raw)")  # predictors that are no baselines

Record = dict[str, Any]


def learning_curves(*records: Record) -> Figure:
    """Validation AUROC by step of seed 0, and beside its end AUROC on the test split, best baseline and aim.

    Of `IN_FULL` the test's is of verdicts met in full; the curve, which training watched, is of those above a half.
    """
    figure = Figure(figsize=(9.6, 2.7), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(records), sharey=True)
    for ax, record, (data, (_, aim)) in zip(panels, records, LEARNT.items(), strict=True):
        found = record["seeds"]["0"]
        in_full = data in IN_FULL
        steps = [point["step"] for point in found["curve"]]
        curve = {"color": GREY if in_full else BLUE, "linestyle": ":" if in_full else "-"}
        ax.plot(steps, [point["auroc"] for point in found["curve"]], marker=".", label="validation", **curve)
        auroc = found["met_in_full"]["auroc"] if in_full else {n: row["auroc"] for n, row in found["numbers"].items()}
        _with_interval(ax, steps[-1] * 1.08, auroc["model"], BLUE, "test")
        name = _best_baseline(auroc)
        _with_interval(ax, steps[-1] * 1.18, auroc[name], ORANGE, "best baseline, test")
        ax.axhline(aim, color=GREY, linestyle="--", linewidth=1, label="aim")
        question = ", met in full" if in_full else ""
        ax.set(title=f"{data}{question}\n(baseline: {name})", xlabel="step", ylim=(0.45, 0.95))
        ax.title.set_fontsize(9)
    panels[0].set_ylabel("AUROC of verdicts")
    panels[0].legend(frameon=False, fontsize=7, loc="lower right")
    return figure


def _with_interval(ax: Axes, x: float, one: dict[str, float], colour: str, label: str) -> None:
    error = [[one["value"] - one["low"]], [one["high"] - one["value"]]]
    ax.errorbar([x], [one["value"]], yerr=error, color=colour, marker="D", markersize=4, capsize=2, label=label)


def _best_baseline(values: dict[str, dict[str, float] | None]) -> str:
    """The name of the baseline with the highest estimate; zero-shot is the model before any training."""
    others = {name: one for name, one in values.items() if one and name not in _OURS and "generators" not in name}
    return max(others, key=lambda name: others[name]["value"])


def tail_matters(record: Record) -> Figure:
    """Gold against KL by reward, of best-of-n and of GRPO: seeds thin, for best-of-n their mean thick."""
    figure = Figure(figsize=(9.6, 3.4), layout="constrained", facecolor="white")
    best, grpo = figure.subplots(1, 2)
    for name, colour in REWARDS.items():
        curves = [seed["best_of_n"][name]["curve"] for seed in record["seeds"].values()]
        kl = [row["kl"]["value"] for row in curves[0]]
        gold = np.array([[row["gold"]["value"] for row in curve] for curve in curves])
        for one in gold:
            best.plot(kl, one, color=colour, linewidth=0.7, alpha=0.35)
        best.plot(kl, gold.mean(axis=0), color=colour, linewidth=2, label=name.replace("_", " "))
        for seed in record["seeds"].values():
            points = seed.get("grpo", {}).get(name, {}).get("curve", [])
            grpo.plot([p["kl"] for p in points], [p["gold"] for p in points], color=colour, linewidth=1.2, alpha=0.8)
    best.set(title="best of n", xlabel="KL (nats a response)", ylabel="gold")
    grpo.set(title="GRPO, means over updates", xlabel="KL (nats a response)", ylabel="gold of the rollouts")
    best.legend(frameon=False)
    return figure


def seesaw(record: Record) -> Figure:
    """What each way of training gained on either family: seeds as dots, their median as a line."""
    figure = Figure(figsize=(8.4, 3.0), layout="constrained", facecolor="white")
    ax = figure.subplots()
    names = [name for name in record["spread"] if name != "start"]
    families = next(iter(record["seeds"].values()))["start"]
    for family, colour, shift in zip(families, (BLUE, ORANGE), (-0.12, 0.12), strict=True):
        for place, name in enumerate(names):
            gains = [seed[name][family] - seed["start"][family] for seed in record["seeds"].values()]
            ax.plot([place + shift] * len(gains), gains, ".", color=colour, label=family if place == 0 else None)
            ax.plot([place + shift - 0.08, place + shift + 0.08], [np.median(gains)] * 2, color=colour, linewidth=2)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set_xticks(range(len(names)), names)
    ax.set(xlabel="trained on", ylabel="gold gained on test prompts")
    ax.legend(frameon=False, title="prompts of")
    return figure


def planted_exploit(record: Record) -> Figure:
    """Share of rollouts with the mark, and gold of the rollouts, by update: seeds thin, their mean thick.

    What goes on from another run is drawn behind it.
    """
    figure = Figure(figsize=(8.4, 3.2), layout="constrained", facecolor="white")
    panels = {"mark_by_update": "share of rollouts with the mark", "gold_by_update": "gold without the vetoes"}
    for ax, (key, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        seeds = list(record["seeds"].values())
        length = len(seeds[0]["undefended"][key])
        for name, colour, after in (("undefended", ORANGE, 0), ("defended", BLUE, 0), ("recovered", GREEN, length)):
            if all(name in seed for seed in seeds):
                _lines(ax, [running_mean(seed[name][key], SMOOTH) for seed in seeds], colour, name, after)
        ax.set(xlabel=f"update (means over {SMOOTH})", ylabel=label, ylim=(0, 1))
        ax.legend(frameon=False)
    return figure


def _lines(ax: Axes, curves: Sequence[np.ndarray], colour: str, name: str, after: int) -> None:
    x = np.arange(len(curves[0])) + SMOOTH + after
    for curve in curves:
        ax.plot(x, curve, color=colour, linewidth=0.8, alpha=0.4)
    ax.plot(x, np.mean(curves, axis=0), color=colour, linewidth=2, label=name)


# of each figure: what draws it, and the records that it reads
FIGURES: dict[str, tuple[Callable[..., Figure], tuple[str, ...]]] = {
    "learning-curves": (learning_curves, tuple(name for name, _ in LEARNT.values())),
    "planted-exploit": (planted_exploit, ("planted-exploit",)),
    "seesaw": (seesaw, ("seesaw",)),
    "tail-matters": (tail_matters, ("tail-matters",)),
}


def draw(folder: Path = FOLDER, results: Path = RESULTS) -> list[Path]:
    """Draw every figure whose records are in ``results`` into ``folder``; returns what was drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, (figure, records) in FIGURES.items():
        paths = [results / f"{record}.json" for record in records]
        if all(path.exists() for path in paths):
            found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
            figure(*found).savefig(folder / f"{name}.png", dpi=130, metadata={"Software": None})
            drawn.append(folder / f"{name}.png")
    return drawn


if __name__ == "__main__":
    for path in draw():
        print(path.relative_to(ROOT))
