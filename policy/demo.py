"""The main job in one run: every stage after the other, then a table of what came out of it.

Owns the order of the stages, the paths between them, and the closing summary. What a stage does is its own
module; every number in the summary but the speed comes from a stage's report. Never imports torch itself.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from policy.config import DemoConfig
from rubric_data.files import start_run, write_json, write_text
from rubric_data.io import read_judged
from rubric_data.judges import Judge, JudgeRequest
from rubric_data.records import JudgedResponse
from rubric_data.split import of_split

if TYPE_CHECKING:
    from rm.scorer import RubricScorer

_RUNS = {
    "judge": "rm.judging:run_judge",
    "train": "rm.train:run_train",
    "calibrate": "rm.calibrating:run_calibrate",
    "audit": "rm.audit:run_audit",
    "policy": "policy.ppo:run_ppo",
}
_MODEL, _RAW = "model", "model (raw)"  # the audit's names for the model with and without its calibration
_OF_PPO = (
    "prompts_evaluated",
    "responses_per_prompt",
    "gold_before",
    "gold_after",
    "gold_gain",
    "proxy_before",
    "proxy_after",
    "proxy_gain",
    "kl_final",
)
_CALIBRATED = (
    ("tail pair accuracy", "tail_pair_accuracy"),
    ("Brier score", "brier"),
    ("reward error, model's top", "reward_error"),
    ("reward bias, model's top", "reward_bias"),
    ("lower bound holds", "lower_bound"),
)
_UNDEFINED = "–"
_LEGEND = "[low high]: 95 % interval over prompts"

Estimate = dict[str, float | None]  # value, low, high: a number with its interval


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run every stage into a folder of its own under ``config.output``; write summary.json and summary.md there.

    Returns the summary. Raises UserError if the folder holds a run already, and whatever a stage raises.
    """
    stages = connect(config)
    folder = start_run(config.output, asdict(stages))
    console = Console()
    begun = cpu_ticks()
    seconds: dict[str, float] = {}

    def timed(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        console.rule(f"demo: {name}")
        begin = time.perf_counter()
        report = run()
        seconds[name] = round(time.perf_counter() - begin, 1)
        return report

    def stage(name: str) -> Callable[[], dict[str, Any]]:
        return lambda: resolve_name(_RUNS[name])(getattr(stages, name))

    timed("judge", stage("judge"))
    timed("train", stage("train"))
    timed("calibrate", stage("calibrate"))
    audit = timed("audit", stage("audit"))
    speed = timed("speed", lambda: _speed(stages))
    ppo = timed("ppo", stage("policy"))

    summary = summarise(audit, speed, ppo, seconds, stolen_share(begun, cpu_ticks()))
    write_json(folder / "summary.json", summary)
    sections = tabulate(summary)
    write_text(folder / "summary.md", markdown(sections))
    console.rule("demo: what came out")
    console.print(render(sections))
    console.print(f"written: {folder / 'summary.md'}, {folder / 'audit' / 'audit.html'}", soft_wrap=True)
    return summary


def connect(config: DemoConfig) -> DemoConfig:
    """``config`` with every stage reading what the one before it wrote, each in its own folder of the output."""
    folder = Path(config.output)
    judged, model = str(folder / "judge" / "judged.jsonl"), str(folder / "train" / "model")
    return replace(
        config,
        judge=replace(config.judge, output=str(folder / "judge"), resume=False),
        train=replace(config.train, output=str(folder / "train"), data=judged, resume=False),
        calibrate=replace(config.calibrate, model=model, data=judged, overwrite=False),
        audit=replace(config.audit, output=str(folder / "audit"), model=model, data=judged),
        policy=replace(config.policy, output=str(folder / "ppo"), reward_model=model, data=judged, resume=False),
    )


def cpu_ticks() -> list[int]:
    """What the processors did so far, in the kinds of proc(5), of which the eighth is stolen; [] if not told."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    except OSError:
        return []
    return [int(count) for count in first.split()[1:]]


def stolen_share(before: Sequence[int], after: Sequence[int]) -> float:
    """Share of processor time, in [0, 1], that a hypervisor gave to others meanwhile: why a run may be slow."""
    spent = [late - early for early, late in zip(before, after, strict=True)]
    total = sum(spent)
    return spent[7] / total if len(spent) > 7 and total else 0.0


# --- speed -----------------------------------------------------------------------------------------------------------


def _speed(stages: DemoConfig) -> dict[str, Any]:
    from rm.local_judge import LocalJudge
    from rm.scorer import RubricScorer

    held_out = of_split(read_judged(stages.train.data), stages.audit.split)
    return compare_speed(
        held_out[: stages.speed_responses],
        RubricScorer.from_pretrained(stages.audit.model, dtype=stages.train.dtype, use_verifiers=False),
        LocalJudge(stages.train.model, dtype=stages.train.dtype),
    )


def compare_speed(records: Sequence[JudgedResponse], scorer: "RubricScorer", judge: Judge) -> dict[str, Any]:
    """Criteria answered per second by the reward model and by a judge on the same backbone, and their ratio.

    Both read the same responses and criteria in this process, after a warm-up on the first response; loading is
    not counted. The reward model shares what responses of one prompt have in common, so the order matters to it.
    """
    criteria = sum(len(record.rubric.criteria) for record in records)

    def score(some: Sequence[JudgedResponse]) -> None:
        scorer.score([r.prompt for r in some], [r.response for r in some], [r.rubric for r in some])

    def ask(some: Sequence[JudgedResponse]) -> None:
        judge.judge([JudgeRequest(r.prompt, r.response, r.rubric.criteria) for r in some])

    def rate(run: Callable[[Sequence[JudgedResponse]], None]) -> float:
        run(records[:1])
        begin = time.perf_counter()
        run(records)
        return criteria / (time.perf_counter() - begin)

    fast, slow = rate(score), rate(ask)
    return {
        "prompts": len({record.prompt for record in records}),
        "responses": len(records),
        "criteria": criteria,
        "reward_model_per_second": fast,
        "local_judge_per_second": slow,
        "ratio": fast / slow,
    }


# --- summary ---------------------------------------------------------------------------------------------------------


def summarise(
    audit: dict[str, Any], speed: dict[str, Any], ppo: dict[str, Any], seconds: dict[str, float], stolen: float = 0.0
) -> dict[str, Any]:
    """The numbers of the closing table, picked from the stages' reports."""
    return {
        "held_out": {
            "prompts": audit["prompts"],
            "responses": audit["responses"],
            "verdicts": audit["verdicts"],
            "tail": audit["tail"],
            "predictors": {
                name: {
                    "accuracy": one["criterion"]["accuracy"],
                    "auroc": one["criterion"]["auroc"],
                    "tail_pair_accuracy": one["reward"]["tail_pair_accuracy"]["half"],
                    "auroc_behind_model": audit["model_minus"].get(name, {}).get("auroc"),
                }
                for name, one in audit["predictors"].items()
            },
        },
        "calibration": {
            "tail_pair_accuracy_before": audit["predictors"][_RAW]["reward"]["tail_pair_accuracy"]["half"],
            "tail_pair_accuracy_after": audit["predictors"][_MODEL]["reward"]["tail_pair_accuracy"]["half"],
            "brier_before": audit["predictors"][_RAW]["criterion"]["brier"],
            "brier_after": audit["predictors"][_MODEL]["criterion"]["brier"],
            **_reward_calibration(audit.get("reward_level")),
        },
        "speed": speed,
        "policy": {key: ppo[key] for key in _OF_PPO},
        "seconds": seconds | {"total": round(sum(seconds.values()), 1)},
        "stolen": round(stolen, 3),
    }


def _reward_calibration(level: dict[str, Any] | None) -> dict[str, Estimate | None]:
    """Rewards where the model likes them best, before and after; nothing if too few prompts were left to map them."""
    found: dict[str, Estimate | None] = {}
    for kind in ("error", "bias"):
        found[f"reward_{kind}_before"] = level and level[kind]["raw"]["proxy_tail"]
        found[f"reward_{kind}_after"] = level and level[kind]["calibrated"]["proxy_tail"]
    held = level and level["coverage"]["lower_bound"]["tilted"]
    return found | {"lower_bound_before": None, "lower_bound_after": held}


@dataclass(frozen=True)
class Section:
    """One table: a title, column heads, and rows of finished text; a note below it."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


def tabulate(summary: dict[str, Any]) -> list[Section]:
    """The tables of a summary, for the terminal and for Markdown alike."""
    held_out, calibration, speed = summary["held_out"], summary["calibration"], summary["speed"]
    policy, seconds = summary["policy"], summary["seconds"]
    return [
        Section(
            f"Agreement with the judge on {held_out['prompts']} held-out prompts",
            ("predictor", "accuracy", "AUROC", "model's AUROC lead"),
            [
                (name, _text(one["accuracy"]), _text(one["auroc"]), _text(one["auroc_behind_model"], signed=True))
                for name, one in held_out["predictors"].items()
            ],
            f"{held_out['verdicts']:,} verdicts on {held_out['responses']} responses",
        ),
        Section(
            f"Calibration, and the tail (each prompt's top {held_out['tail']:.0%})",
            ("measure", "before", "after"),
            [
                (title, _text(calibration[f"{key}_before"]), _text(calibration[f"{key}_after"]))
                for title, key in _CALIBRATED
            ],
        ),
        Section(
            "Speed on this machine, same backbone, same responses and criteria",
            ("who answers", "criteria / s"),
            [
                ("reward model", f"{speed['reward_model_per_second']:.1f}"),
                ("local judge, one sequence per criterion", f"{speed['local_judge_per_second']:.1f}"),
                ("ratio", f"{speed['ratio']:.1f}"),
            ],
            f"{speed['criteria']} criteria, {speed['responses']} responses, {speed['prompts']} prompts",
        ),
        Section(
            f"Reward of the policy before and after PPO, on {policy['prompts_evaluated']} held-out prompts",
            ("reward", "before", "after", "gain"),
            [
                (
                    title,
                    _text(policy[f"{key}_before"]),
                    _text(policy[f"{key}_after"]),
                    _text(policy[f"{key}_gain"], signed=True),
                )
                for title, key in (("gold (the judge)", "gold"), ("proxy (reward model)", "proxy"))
            ],
            f"{policy['responses_per_prompt']} responses a prompt; KL to the starting policy {policy['kl_final']:.2f}",
        ),
        Section(
            "Wall time",
            tuple(seconds),
            [tuple(_minutes(value) for value in seconds.values())],
            f"other machines took {summary['stolen']:.0%} of the processors' time meanwhile"
            if summary["stolen"]
            else "",
        ),
    ]


def render(sections: Sequence[Section]) -> Group:
    """The tables for a terminal of 80 columns or more."""
    shown: list[RenderableType] = []
    for section in sections:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0))
        for place, column in enumerate(section.columns):
            table.add_column(column, justify="left" if place == 0 else "right", no_wrap=True)
        for row in section.rows:
            table.add_row(*(Text(cell) for cell in row))
        note = [Text(f"  {section.note}\n", style="dim")] if section.note else []
        shown += [Text(section.title, style="bold"), table, *note]
    return Group(*shown, Text(_LEGEND))


def markdown(sections: Sequence[Section]) -> str:
    """The tables as a Markdown document."""
    blocks = ["# Summary of the demo run", f"{_LEGEND}."]
    for section in sections:
        lines = [section.columns, tuple("---" for _ in section.columns), *section.rows]
        blocks += [f"## {section.title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
        blocks += [section.note + "."] if section.note else []
    return "\n\n".join(blocks) + "\n"


def _text(estimate: Estimate | None, *, signed: bool = False) -> str:
    """'.853 [.81 .89]'; a dash where the number is undefined, no interval where that is."""
    if estimate is None or estimate["value"] is None:
        return _UNDEFINED
    low, high = estimate["low"], estimate["high"]
    interval = "" if low is None or high is None else f" [{_short(low, 2, signed)} {_short(high, 2, signed)}]"
    return _short(estimate["value"], 3, signed) + interval


def _short(value: float, decimals: int, signed: bool) -> str:
    """``value`` rounded, without the zero before its point: .853, +.10, 1.000."""
    text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 and "0." in text[:3] else text


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
