"""What an RL run keeps of the rollouts that its judge has seen: the verdicts, and what the reward model had answered.

Two files in the run folder that grow with every look. judged.jsonl has the rollouts as records with the judge's
verdicts, so that `audit`, `train` and all who read judged responses can read it; scores.jsonl has the reward model's
answers to the same, as it gave them then, in the form of `score`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from policy.adapter import Rollout
from rm.scores import score_rows
from rubric_data.files import write_text
from rubric_data.records import JudgedResponse, Verdict

JUDGED, SCORES = "judged.jsonl", "scores.jsonl"
GENERATOR = "policy"


class JudgedRollouts:
    """The two files in ``folder``, as they were after update ``done``: what an interrupted run wrote later goes."""

    def __init__(self, folder: Path, done: int = 0) -> None:
        self._judged, self._scores = folder / JUDGED, folder / SCORES
        for path in (self._judged, self._scores):
            if path.exists():
                lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the last one may be half a line
                write_text(path, "".join(f"{line}\n" for line in lines if _update(line) <= done))

    def add(self, step: int, rollouts: Sequence[Rollout], verdicts: Sequence[Sequence[Verdict]]) -> None:
        """Append rollouts of update ``step`` that the judge was asked about, masked verdicts included."""
        records = [
            as_record(rollout, own, f"update-{step}-{place}")
            for place, (rollout, own) in enumerate(zip(rollouts, verdicts, strict=True), start=1)
        ]
        rows = score_rows(records, [rollout.scored for rollout in rollouts])
        _append(self._judged, [record.model_dump_json() for record in records])
        _append(self._scores, [json.dumps(row, ensure_ascii=False) for row in rows])


def as_record(rollout: Rollout, verdicts: Sequence[Verdict], response_id: str) -> JudgedResponse:
    """A rollout as a judged response; split, source and licence are those of its prompt."""
    prompt = rollout.prompt
    return JudgedResponse(
        prompt_id=prompt.prompt_id,
        prompt=prompt.prompt,
        response_id=response_id,
        response=rollout.response,
        rubric=prompt.rubric,
        generator=GENERATOR,
        verdicts=tuple(verdicts),
        split=prompt.split,
        source=prompt.source,
        licence=prompt.licence,
    )


def update_of(response_id: str) -> int:
    """The update that the rollout ``response_id`` is of."""
    return int(response_id.split("-")[1])


def _update(line: str) -> int:
    return update_of(json.loads(line)["response_id"])


def _append(path: Path, lines: Sequence[str]) -> None:
    with path.open("a", encoding="utf-8") as file:  # flushed on closing: a killed run keeps its looks
        file.write("".join(f"{line}\n" for line in lines))
