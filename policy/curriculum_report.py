"""What came out of a curriculum: gold before and after every stage on the same held-out prompts, whole and by family.

A family that falls while another rises is the seesaw that stages are there to avoid (arXiv:2508.12790). Owns that
arithmetic and the closing tables; every number is from the stages' run folders. P held-out prompts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from policy.evaluate import mean_estimate, paired_difference
from policy.plan import PlannedStage
from policy.run_folder import RESULT, SAMPLES
from rm.page import short, with_interval
from rubric_data.records import JudgedResponse
from rubric_data.tables import print_table

_SIDES = ("before", "after")
_OF_RESULT = ("steps", "seconds", "kl_final", "best_step", "alarm_step", "rolled_back")


@dataclass(frozen=True)
class Outcome:
    """One finished stage: what its result.json says, its prompts in numbers, and each prompt's mean rewards.

    ``rewards``: by ("gold" or "proxy", "before" or "after"), (P,) in [0, 1], NaN where every response is masked.
    """

    name: str
    algorithm: str
    prompts: Mapping[str, Any]
    result: Mapping[str, Any]
    rewards: Mapping[tuple[str, str], np.ndarray]


def outcome(stage: PlannedStage, prompts: Mapping[str, Any], held_out: Sequence[JudgedResponse]) -> Outcome:
    """What is in the run folder of the finished ``stage``, which was measured on the ``held_out`` prompts."""
    result = json.loads((stage.folder / RESULT).read_text(encoding="utf-8"))
    rewards = read_rewards(stage.folder / SAMPLES, [record.prompt_id for record in held_out])
    return Outcome(stage.name, stage.algorithm, prompts, result, rewards)


def read_rewards(path: Path, prompt_ids: Sequence[str]) -> dict[tuple[str, str], np.ndarray]:
    """The mean rewards of each prompt in the file of samples ``path``, as `Outcome` has them.

    Raises ValueError if the prompts there are others.
    """
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if [line["prompt_id"] for line in lines] != list(prompt_ids):
        raise ValueError(f"{path}: holds other prompts than those held out")
    return {
        (kind, side): np.array([_mean([one[kind] for one in line[side]]) for line in lines])
        for kind in ("gold", "proxy")
        for side in _SIDES
    }


def summarise(
    outcomes: Sequence[Outcome], families: Mapping[str, Sequence[int]], *, by: str, differing: Sequence[str] = ()
) -> dict[str, Any]:
    """The report: rewards as ``{value, low, high}``, 95 % intervals over prompts; gains are paired by prompt.

    ``families``: places of the held-out prompts, by name. ``whole`` compares the first stage's start with the last
    one's end; ``differing`` are options that make this a comparison of unlike things.
    """
    first, last = outcomes[0].rewards, outcomes[-1].rewards
    whole = {(kind, side): (first if side == "before" else last)[kind, side] for kind, side in first}
    return {
        "held_out": {
            "prompts": len(first["gold", "before"]),
            "by": by,
            "families": {name: len(places) for name, places in families.items()},
        },
        "stages": [
            {
                "name": one.name,
                "algorithm": one.algorithm,
                "prompts": dict(one.prompts),
                **{key: one.result.get(key) for key in _OF_RESULT},
                **_compared(one.rewards, families),
            }
            for one in outcomes
        ],
        "whole": _compared(whole, families),
        "differing": list(differing),
    }


def _compared(
    rewards: Mapping[tuple[str, str], np.ndarray], families: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, Any]]:
    before_P, after_P = (rewards["gold", side] for side in _SIDES)
    return {
        "gold": _change(before_P, after_P),
        "proxy": _change(rewards["proxy", "before"], rewards["proxy", "after"]),
        "families": {name: _change(before_P[list(own)], after_P[list(own)]) for name, own in families.items()},
    }


def _change(before_P: np.ndarray, after_P: np.ndarray) -> dict[str, dict[str, float | None]]:
    return {
        "before": mean_estimate(before_P).as_dict(),
        "after": mean_estimate(after_P).as_dict(),
        "gain": paired_difference(before_P, after_P).as_dict(),
    }


def _mean(rewards: Sequence[float | None]) -> float:
    known = [reward for reward in rewards if reward is not None]
    return float(np.mean(known)) if known else np.nan


# --- tables ----------------------------------------------------------------------------------------------------------


def show(report: Mapping[str, Any]) -> None:
    """The closing tables on the terminal."""
    held_out = report["held_out"]
    note = "kept/chosen prompts; gain [low high]: 95 % interval over prompts; KL: nats from the stage's own start"
    if report["differing"]:
        note += f"; stages differ in {', '.join(report['differing'])}, so compare them with care"
    print_table(
        f"Gold reward on the same {held_out['prompts']} held-out prompts",
        ("stage", "algorithm", "prompts", "before", "after", "gain", "KL"),
        stage_rows(report),
        note,
    )
    if len(held_out["families"]) > 1:
        ends = [f"after {number}" for number in range(1, len(report["stages"]) + 1)]
        print_table(
            f"Gold reward by {held_out['by']}", ("family", "prompts", "start", *ends, "gain"), family_rows(report)
        )


def stage_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row a stage, and one from the first one's start to the last one's end."""
    rows = []
    for number, stage in enumerate(report["stages"], start=1):
        prompts = f"{stage['prompts']['kept']}/{stage['prompts']['chosen']}"
        kl = short(stage["kl_final"], 2)
        rows.append((f"{number} {stage['name']}", stage["algorithm"], prompts, *_cells(stage["gold"]), kl))
    return [*rows, ("whole", "", "", *_cells(report["whole"]["gold"]), "")]


def family_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row a family: its gold at the start, after every stage, and the gain in all."""
    return [
        (
            name,
            str(count),
            short(report["whole"]["families"][name]["before"]["value"], 3),
            *(short(stage["families"][name]["after"]["value"], 3) for stage in report["stages"]),
            with_interval(report["whole"]["families"][name]["gain"], signed=True),
        )
        for name, count in report["held_out"]["families"].items()
    ]


def _cells(change: Mapping[str, Any]) -> tuple[str, str, str]:
    before, after = (short(change[side]["value"], 3) for side in _SIDES)
    return before, after, with_interval(change["gain"], signed=True)
