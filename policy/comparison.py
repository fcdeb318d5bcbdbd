"""Several RL runs side by side on one HTML page: gold against KL, what each gained, and what they differ in.

Owns the command `rubric-rm page`, too, which makes the page of a single run anew (`policy.run_page`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from scipy import stats

from policy.config import PageConfig
from policy.evaluate import paired_difference
from policy.run_digest import Estimated, Point, against_kl, best_step, first_alarm, kl_spent, verdict
from policy.run_folder import Run, read_run
from policy.run_page import PAGE, draw_estimates, keep_to_rewards, label_kl
from policy.run_page import render as render_run
from policy.watching import DECLINE
from rm import page
from rm.metrics import LEVEL
from rm.page import COLOURS, MARKERS, listed, number, short, side, signed_interval, svg, with_interval
from rubric_data.errors import UserError
from rubric_data.files import flat, refuse_existing, write_text
from rubric_data.tables import print_table

_POINTS = 8  # of each run's gold against KL
_OWN = ("output", "seed", "resume")  # options that may differ between runs that repeat one another
_UNKNOWN: Estimated = {"value": None, "low": None, "high": None}


@dataclass(frozen=True)
class Compared:
    """One of several runs: its name among them, and the number of its setting, which runs that repeat it share.

    ``ahead``: its gold on held-out prompts after training less that of the first run, paired by prompt; None if the
    prompts are not the same.
    """

    name: str
    run: Run
    setting: int
    points: list[Point]
    ahead: Estimated | None

    @property
    def colour(self) -> str:
        """That of its setting."""
        return COLOURS[self.setting % len(COLOURS)]

    @property
    def marker(self) -> str:
        """That of its setting."""
        return MARKERS[self.setting % len(MARKERS)]

    @property
    def gains(self) -> dict[str, Any] | None:
        """Its result, if it has ended and some held-out prompt has gold before and after."""
        result = self.run.result
        return None if result is None or result["gold_gain"]["value"] is None else result

    @property
    def kl(self) -> float | None:
        """What it has spent."""
        return kl_spent(self.run)

    @property
    def best_step(self) -> int | None:
        """The update with the best gold."""
        return best_step(self.run.rows)

    @property
    def declined(self) -> int | None:
        """The update at which gold had declined."""
        return first_alarm(self.run.rows, DECLINE)


def run_page(config: PageConfig) -> dict[str, Any]:
    """Write the page of one run, or of several side by side, and say on the terminal what stands at its top.

    Returns where the page is. Raises UserError on bad input.
    """
    if not config.runs:
        raise UserError("runs: needs a run folder at least, got none")
    if config.output is None and len(config.runs) > 1:
        raise UserError("output: is missing; several runs have one page, so say where: --output page.html")
    path = Path(config.runs[0], PAGE) if config.output is None else Path(config.output)
    if config.output is not None:
        refuse_existing(path, config.overwrite)
    runs = [read_run(folder) for folder in config.runs]
    if len(runs) == 1:
        write_text(path, render_run(runs[0]))
        said = verdict(runs[0])
    else:
        compared = compare(runs)
        write_text(path, render(compared))
        _print_gains(compared)
        said = compared_in_words(compared)
    print("\n".join([*said, f"written: {path}"]))
    return {"page": str(path)}


def compare(runs: Sequence[Run]) -> list[Compared]:
    """The runs with what tells them apart on a page. Raises UserError if one of them is there twice."""
    kinds = [json.dumps(_settings(run), sort_keys=True) for run in runs]
    order = list(dict.fromkeys(kinds))
    return [
        Compared(
            name,
            run,
            setting=order.index(kind),
            points=against_kl(run.looks, _POINTS),
            ahead=_ahead(run, runs[0]),
        )
        for name, run, kind in zip(short_names([run.folder for run in runs]), runs, kinds, strict=True)
    ]


@dataclass(frozen=True)
class Repeated:
    """What runs of one setting gained on held-out prompts: means over ``runs`` of them, intervals over runs."""

    name: str
    colour: str
    runs: int
    kl: Estimated
    gold: Estimated
    proxy: Estimated


def over_seeds(compared: Sequence[Compared]) -> list[Repeated]:
    """The settings of which two runs or more have ended, by gold gained."""
    found = []
    for setting in sorted({one.setting for one in compared}):
        members = [one for one in compared if one.setting == setting and one.gains]
        if len(members) > 1:
            gains = [one.gains or {} for one in members]
            found.append(
                Repeated(
                    name=f"{members[0].name} and {len(members) - 1} more",
                    colour=members[0].colour,
                    runs=len(members),
                    kl=mean_of_runs([one.kl for one in members]),
                    gold=mean_of_runs([one["gold_gain"]["value"] for one in gains]),
                    proxy=mean_of_runs([one["proxy_gain"]["value"] for one in gains]),
                )
            )
    return sorted(found, key=lambda one: -(one.gold["value"] or 0))


def mean_of_runs(values: Sequence[float | None]) -> Estimated:
    """Mean of two values or more with its 95 % interval by Student's t; unknown if one of them is."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return _UNKNOWN
    mean, count = float(np.mean(known)), len(known)
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1) * np.std(known, ddof=1) / np.sqrt(count))
    return {"value": mean, "low": mean - half, "high": mean + half}


def render(compared: Sequence[Compared]) -> str:
    """The HTML page of several runs, those that gained most gold first. Whatever their texts hold is escaped."""
    plots: dict[str, Markup] = {}
    if any(one.points for one in compared):
        plots |= {key: svg(key, partial(_draw_curves, compared, key), width=4.8) for key in ("gold", "proxy")}
    if any(one.gains and one.kl is not None for one in compared):
        plots["gains"] = svg("gains", partial(_draw_gains, compared), width=4.8)
    return page.render(
        "runs.html.jinja",
        package="policy",
        runs=_by_gain(compared),
        repeated=over_seeds(compared),
        first=compared[0].name,
        verdict=compared_in_words(compared),
        plots=plots,
        differing=differing([one.run for one in compared]),
        names=[one.name for one in compared],
    )


def compared_in_words(compared: Sequence[Compared]) -> list[str]:
    """What stands at the top: who gained most, where proxy and gold part, alarms, and what does not compare."""
    ended, said = [one for one in _by_gain(compared) if one.gains], []
    if len(ended) > 1:
        most, least = (f"{one.name} ({_gain(one)})" for one in (ended[0], ended[-1]))
        said.append(f"On held-out prompts {most} gained the most gold, {least} the least.")
    means = [f"{signed_interval(one.gold)} by {one.name}" for one in over_seeds(compared)]
    if means:
        said.append(f"On average over seeds, gold gained {listed(means)}.")
    parted = [one.name for one in compared if one.gains and side(one.gains.get("gain_gap", _UNKNOWN)) == "ahead"]
    if parted:
        said.append(f"Proxy gained measurably more than gold in {listed(parted)}.")
    declined = [f"{one.name} (update {one.declined})" for one in compared if one.declined is not None]
    said.append(
        f"Gold declined in {listed(declined)}." if declined else "In no run did the alarm say that gold declined."
    )
    going = [f"{one.name} (update {one.run.rows[-1]['step']})" for one in compared if one.run.result is None]
    if going:
        said.append(f"Not ended, hence without gains: {listed(going)}.")
    if len({_prompts(one.run) for one in ended}) > 1:
        said.append("The runs were not evaluated on the same prompts, so their gains do not compare.")
    return said


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The options on which the runs differ, by dotted name, each with the value of every run; output aside."""
    options = [{"command": run.method.lower()} | flat(run.config) for run in runs]
    found = {}
    for name in dict.fromkeys(name for one in options for name in one if name not in ("output", "resume")):
        values = ["–" if name not in one else json.dumps(one[name], ensure_ascii=False).strip('"') for one in options]
        if len(set(values)) > 1:
            found[name] = values
    return found


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell all of them apart. Raises UserError if one is there twice."""
    parts = [folder.resolve().parts for folder in folders]
    for one in parts:
        if parts.count(one) > 1:
            raise UserError(f"runs: {Path(*one)} is there twice; name each run once")
    size = 1
    while len({one[-size:] for one in parts}) < len(parts):
        size += 1
    return ["/".join(one[-size:]) for one in parts]


def _settings(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.config.items() if key not in _OWN} | {"command": run.method}


def _ahead(run: Run, first: Run) -> Estimated | None:
    if run is first or not run.samples or _prompts(run) != _prompts(first):
        return None
    return paired_difference(_gold_after(first), _gold_after(run)).as_dict()


def _prompts(run: Run) -> tuple[str, ...]:
    return tuple(sample["prompt"] for sample in run.samples)


def _gold_after(run: Run) -> np.ndarray:
    """Mean gold of each held-out prompt after training, (P,); NaN where no response has one."""
    known = [[one["gold"] for one in sample["after"] if one["gold"] is not None] for sample in run.samples]
    return np.array([np.mean(golds) if golds else np.nan for golds in known])


def _by_gain(compared: Sequence[Compared]) -> list[Compared]:
    return sorted(compared, key=lambda one: -one.gains["gold_gain"]["value"] if one.gains else np.inf)


def _gain(one: Compared) -> str:
    at = "" if one.kl is None else f" at KL {number(one.kl, 2)}"
    return "" if one.gains is None else signed_interval(one.gains["gold_gain"]) + at


def _print_gains(compared: Sequence[Compared]) -> None:
    def row(one: Compared) -> list[str]:
        result = one.run.result or {}
        gains = [with_interval(result.get(key), signed=True) for key in ("gold_gain", "proxy_gain")]
        return [one.name, short(one.kl, 2), *gains, "–" if one.declined is None else str(one.declined)]

    columns = ("run", "KL", "gold gained", "proxy gained", "alarm")
    print_table("on held-out prompts", columns, [row(one) for one in _by_gain(compared)])


# --- plots -----------------------------------------------------------------------------------------------------------


def _draw_curves(compared: Sequence[Compared], of: str, ax: Axes) -> None:
    for one in compared:
        kl = [point.kl for point in one.points]
        if of == "gold":
            draw_estimates(ax, kl, [point.gold for point in one.points], one.colour, one.marker, "", "-")
        else:
            values = [np.nan if point.proxy is None else point.proxy for point in one.points]
            ax.plot(kl, values, color=one.colour, marker=one.marker, markersize=4, linewidth=1.4)
    label_kl(ax, [point.kl for one in compared for point in one.points])
    ax.set(ylabel=f"{of} of the rollouts")
    keep_to_rewards(ax)


def _draw_gains(compared: Sequence[Compared], ax: Axes) -> None:
    """Gains on held-out prompts at the KL spent: gold as filled points with intervals, proxy as hollow ones."""
    ax.axhline(0, color=page.GREY, linewidth=0.8, linestyle=page.DASHED, zorder=0)
    for one in compared:
        if one.gains and one.kl is not None:
            draw_estimates(ax, [one.kl], [one.gains["gold_gain"]], one.colour, one.marker, "", "none")
            proxy = one.gains["proxy_gain"]["value"]
            ax.plot([one.kl], [proxy], one.marker, color=one.colour, markersize=5, fillstyle="none")
    ax.set(xlabel="KL spent, nats a response", ylabel="gained on held-out prompts")
    ax.margins(x=0.1)
    ax.set_xlim(left=0)
