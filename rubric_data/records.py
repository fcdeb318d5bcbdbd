"""The records every stage exchanges: criterion, rubric, verdict, prompt, judged response.

A record checks itself once, where it is born; whoever holds one may trust it.
Reading and writing files is `rubric_data.io`; turning verdicts into a reward is `rubric_data.reward`.
"""

import hashlib
import json
import math
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, JsonValue, Strict, model_validator

Split = Literal["train", "validation", "test"]
Number = Annotated[float, Strict()]  # "2.0" and true are none


class Record(BaseModel):
    """Base of all records: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Level(Record):
    """One tier of an ordinal criterion."""

    label: str
    anchor: str = ""  # what a response on this tier looks like


class Verifier(Record):
    """A programmatic check by name, with its arguments; `rubric_data.verifiers` runs it."""

    name: str
    args: dict[str, JsonValue] = {}


class Criterion(Record):
    """One question asked of a response.

    ``text`` is put so that 1.0 means "met"; a negative ``weight`` makes being met a pitfall.
    ``levels`` run from worst to best; the verdict of level i of L is i / (L - 1).
    ``veto``: the response's reward is multiplied by this verdict.
    """

    id: str
    text: str
    weight: Number = 1.0
    levels: tuple[Level, ...] = ()
    veto: bool = False
    tags: tuple[str, ...] = ()
    verifier: Verifier | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        where = f"criterion {self.id!r}"
        if not self.id.strip():
            raise ValueError("criterion: id must not be empty")
        if not self.text.strip():
            raise ValueError(f"{where}: text must not be empty")
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ValueError(f"{where}: weight must be finite and non-zero, got {self.weight}")
        if len(self.levels) == 1:
            raise ValueError(f"{where}: levels need at least two tiers, got 1")
        if self.veto and self.weight < 0:
            raise ValueError(f"{where}: a veto must have a positive weight, got {self.weight}")
        return self


class Rubric(Record):
    """Criteria with weights. At least one weight is positive; ids are unique."""

    criteria: tuple[Criterion, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.criteria:
            raise ValueError("rubric: needs at least one criterion, got none")
        seen: set[str] = set()
        for criterion in self.criteria:
            if criterion.id in seen:
                raise ValueError(f"rubric: criterion id {criterion.id!r} appears twice; ids must be unique")
            seen.add(criterion.id)
        if all(criterion.weight < 0 for criterion in self.criteria):
            raise ValueError("rubric: every weight is negative; at least one criterion must be worth something")
        return self

    @cached_property
    def id(self) -> str:
        """Content hash of the criteria, 16 hex digits: equal rubrics have equal ids."""
        return content_hash([criterion.model_dump() for criterion in self.criteria])[:16]


class Verdict(Record):
    """A judge's answer to one criterion: ``value`` in [0, 1], or masked with the reason.

    A masked verdict is an abstention and never counts as "not met".
    """

    criterion_id: str
    value: Number | None = None
    masked: str | None = None  # why there is no value, e.g. "parse_failure: ..."
    judge: str = ""
    human: Number | None = None  # a human's answer to the same question, where there is one
    count: Number = 1.0  # how many independent answers ``value`` is worth: votes and judges raise it

    @model_validator(mode="after")
    def _check(self) -> Self:
        where = f"verdict on {self.criterion_id!r}"
        if not (self.count > 0 and math.isfinite(self.count)):
            raise ValueError(f"{where}: count must be positive and finite, got {self.count}")
        if (self.value is None) == (self.masked is None):
            raise ValueError(f"{where}: needs either a value or a reason for being masked")
        for name in ("value", "human"):
            number = getattr(self, name)
            if number is not None and not 0 <= number <= 1:
                raise ValueError(f"{where}: {name} must lie in [0, 1], got {number}")
        return self


class PromptRecord(Record):
    """A prompt before anybody responded, with its rubric once it has one."""

    prompt_id: str
    prompt: str
    rubric: Rubric | None = None
    split: Split | None = None
    source: str = ""
    licence: str = ""  # of the source, as its publisher names it


class Response(Record):
    """One response to one prompt, with its rubric once it has one, and the verdicts so far (none before judging)."""

    prompt_id: str
    prompt: str
    response_id: str
    response: str
    rubric: Rubric | None = None
    generator: str = "unknown"  # who wrote the response
    verdicts: tuple[Verdict, ...] = ()
    split: Split | None = None
    source: str = ""
    licence: str = ""  # of the source, as its publisher names it
    preference: Number | None = None  # people's, comparable among a prompt's responses: higher is preferred

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.preference is not None and not math.isfinite(self.preference):
            raise ValueError(f"response {self.response_id!r}: preference must be finite, got {self.preference}")
        known = {criterion.id for criterion in self.rubric.criteria} if self.rubric else set()
        seen: set[str] = set()
        for verdict in self.verdicts:
            if verdict.criterion_id not in known:
                raise ValueError(
                    f"response {self.response_id!r}: verdict on unknown criterion {verdict.criterion_id!r}"
                )
            if verdict.criterion_id in seen:
                raise ValueError(f"response {self.response_id!r}: two verdicts on {verdict.criterion_id!r}")
            seen.add(verdict.criterion_id)
        return self


class JudgedResponse(Response):
    """A response that can be judged: it has a rubric."""

    rubric: Rubric

    def values(self) -> list[float]:
        """Verdict values in the rubric's order, (K,); NaN where masked or not judged."""
        by_id = {verdict.criterion_id: verdict.value for verdict in self.verdicts}
        found = (by_id.get(criterion.id) for criterion in self.rubric.criteria)
        return [math.nan if value is None else value for value in found]

    def counts(self) -> list[float]:
        """How many independent answers each of `values` is worth, (K,); NaN where masked or not judged."""
        by_id = {verdict.criterion_id: verdict.count for verdict in self.verdicts if verdict.value is not None}
        return [by_id.get(criterion.id, math.nan) for criterion in self.rubric.criteria]


def content_hash(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``, 64 hex digits."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
