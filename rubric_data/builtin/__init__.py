"""The embedded data: prompts of twelve kinds with rubrics that programs can verify, and responses of all qualities.

This module reads the files; `rubric_data.builtin.recipe` and `rm.build_builtin` make them.
"""

import functools
import json
from importlib import resources
from typing import Any

from rubric_data.records import JudgedResponse, Rubric

SOURCE = "rubric-rm"


@functools.cache
def _records() -> tuple[JudgedResponse, ...]:
    prompts = {record["prompt_id"]: record for record in _read("prompts.jsonl")}
    rubrics = {prompt_id: Rubric.model_validate(record["rubric"]) for prompt_id, record in prompts.items()}
    return tuple(
        JudgedResponse(
            prompt_id=record["prompt_id"],
            prompt=prompts[record["prompt_id"]]["prompt"],
            response_id=record["response_id"],
            response=record["response"],
            rubric=rubrics[record["prompt_id"]],
            generator=record["generator"],
            split=prompts[record["prompt_id"]]["split"],
            source=SOURCE,
        )
        for record in _read("responses.jsonl")
    )


def load_builtin() -> list[JudgedResponse]:
    """All responses of the embedded data with rubric, split and generator; no verdicts."""
    return list(_records())


def _read(name: str) -> list[dict[str, Any]]:
    text = (resources.files(__package__) / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]
