"""What an RL run has in its folder, read back for whoever looks at runs. Trains nothing, draws nothing."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from policy.rollouts import JUDGED, SCORES, update_of
from rubric_data.errors import UserError
from rubric_data.files import CONFIG_NAME, ORIGIN_NAME
from rubric_data.formats.base import parse
from rubric_data.records import JudgedResponse
from rubric_data.reward import rubric_reward

METRICS, SAMPLES, RESULT = "metrics.jsonl", "samples.jsonl", "result.json"
Row = dict[str, Any]  # one line of metrics.jsonl: numbers, null, the name of an alarm
# by an option that it alone has
_METHODS = {"ppo_epochs": "PPO", "scale_rewards": "GRPO", "normalise": "RLOO", "beta": "online DPO"}


@dataclass(frozen=True)
class JudgedRollout:
    """A rollout of update ``step`` that the judge was asked about, and what the reward model had said of it.

    ``proxy`` and ``gold`` in [0, 1], ``probs`` and ``verdicts`` (K,) in the rubric's order; NaN where there is none.
    """

    step: int
    record: JudgedResponse
    proxy: float
    gold: float
    probs: np.ndarray
    verdicts: np.ndarray


@dataclass(frozen=True)
class Run:
    """A run so far: at least one row of metrics; ``result`` is None, and ``samples`` empty, until it has ended."""

    folder: Path
    config: dict[str, Any]
    origin: dict[str, Any]
    rows: list[Row]
    result: dict[str, Any] | None
    samples: list[dict[str, Any]]
    rollouts: list[JudgedRollout]

    @property
    def method(self) -> str:
        """What trained the policy."""
        return next((name for option, name in _METHODS.items() if option in self.config), "RL")

    @property
    def looks(self) -> list[Row]:
        """The rows at which the judge was asked, and answered."""
        return [row for row in self.rows if row.get("reward/gold") is not None]

    @property
    def sure_looks(self) -> list[Row]:
        """Those of them that have an interval, so that they can raise an alarm."""
        return [row for row in self.looks if row.get("reward/gold_low") is not None]

    @property
    def progress(self) -> str:
        """Updates done, and planned; a run that went on for longer had that changed."""
        done = self.rows[-1]["step"]
        return f"{done} of {max(done, self.config.get('steps', done))}"


def read_run(folder: str | Path) -> Run:
    """The run in ``folder``, which may still be going on. Raises UserError if there is none, or no update of it."""
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file() or not (folder / METRICS).is_file():
        raise UserError(f"{folder}: holds no run of ppo, grpo, rloo or online-dpo; give its --output")
    rows = [row for _, row in _whole_lines(folder / METRICS)]
    if not rows:
        raise UserError(f"{folder / METRICS}: has no update yet; wait until the first has ended")
    result = _read_json(folder / RESULT)
    if result is not None and result["steps"] != len(rows):
        result = None  # of an earlier end, after which the run was resumed
    return Run(
        folder,
        config=_read_json(folder / CONFIG_NAME) or {},
        origin=_read_json(folder / ORIGIN_NAME) or {},
        rows=rows,
        result=result,
        samples=[] if result is None else [sample for _, sample in _whole_lines(folder / SAMPLES)],
        rollouts=_read_rollouts(folder),
    )


def _read_rollouts(folder: Path) -> list[JudgedRollout]:
    """The judged rollouts whose scores are there too, in the order of the file."""
    scores = {row["response_id"]: row for _, row in _whole_lines(folder / SCORES)}
    records = [parse(JudgedResponse, fields, where) for where, fields in _whole_lines(folder / JUDGED)]
    return [_rollout(record, scores[record.response_id]) for record in records if record.response_id in scores]


def _rollout(record: JudgedResponse, row: dict[str, Any]) -> JudgedRollout:
    values = record.values()
    probs = np.array([_number(one["probability"]) for one in row["criteria"]])
    return JudgedRollout(
        step=update_of(record.response_id),
        record=record,
        proxy=rubric_reward(record.rubric, probs),
        gold=rubric_reward(record.rubric, values),
        probs=probs,
        verdicts=np.array(values),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in ``path``; None if there is no such file. Raises UserError if it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}); restore it, or leave the run out") from None


def _whole_lines(path: Path) -> Sequence[tuple[str, dict[str, Any]]]:
    """The object on every line of ``path``, with its place; none if there is no such file.

    What stands after the last line's end is left out: the run is writing it, or was killed as it did.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            found.append((f"{path}:{number}", json.loads(line)))
        except ValueError as error:
            raise UserError(f"{path}:{number}: is no JSON ({error}); restore it, or leave the run out") from None
    return found
