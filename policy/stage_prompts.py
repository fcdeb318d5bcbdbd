"""Which prompts each stage of a curriculum takes, and those held out, which all stages are measured on.

Chooses records by what they are; what a policy's responses to them earn is `rm.filtering`'s to choose by.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from policy.config import PromptChoice
from policy.plan import PlannedStage
from rubric_data.errors import UserError
from rubric_data.io import load_data
from rubric_data.programmatic import is_programmatic
from rubric_data.records import JudgedResponse

Family = Literal["stage", "source", "tag"]
NO_SOURCE, NO_TAG = "no source", "no tag"


@dataclass(frozen=True)
class StagePrompts:
    """The prompts of one stage, a record each: those it may train on, and those held out from all training."""

    training: list[JudgedResponse]
    held_out: list[JudgedResponse]


def gather(stages: Sequence[PlannedStage], eval_prompts: int | None) -> list[StagePrompts]:
    """The prompts of each stage, ``eval_prompts`` of those held out at most (None: all).

    Raises UserError, naming the stage, where a stage has none of either, where stages give one id to different
    prompts, and where one trains on what another holds out.
    """
    read: dict[str, list[JudgedResponse]] = {}
    found = []
    for stage in stages:
        if stage.data not in read:
            read[stage.data] = load_data(stage.data)
        chosen = one_each(record for record in read[stage.data] if is_chosen(record, stage.prompts))
        training = [record for record in chosen if record.split in ("train", "validation")]
        held_out = [record for record in chosen if record.split == "test"][:eval_prompts]
        for records, splits in ((training, "train or validation"), (held_out, "test")):
            if not records:
                raise UserError(
                    f"{stage.where}: {stage.data} has no prompts in split {splits} that 'prompts' would take; "
                    "ask for others there, or give the records' split field"
                )
        found.append(StagePrompts(training, held_out))
    _check_apart(stages, found)
    return found


def is_chosen(record: JudgedResponse, choice: PromptChoice) -> bool:
    """Whether ``choice`` takes the prompt of ``record``."""
    criteria = record.rubric.criteria
    tags = {tag for criterion in criteria for tag in criterion.tags}
    return (
        (choice.ids is None or any(fnmatchcase(record.prompt_id, pattern) for pattern in choice.ids))
        and (choice.sources is None or record.source in choice.sources)
        and (choice.tags is None or not tags.isdisjoint(choice.tags))
        and (choice.verifiable is None or choice.verifiable == all(map(is_programmatic, criteria)))
    )


def one_each(records: Iterable[JudgedResponse]) -> list[JudgedResponse]:
    """The first record of every different prompt under every different rubric, in order."""
    found: dict[tuple[str, str], JudgedResponse] = {}
    for record in records:
        found.setdefault(_key(record), record)
    return list(found.values())


def all_held_out(parts: Iterable[StagePrompts]) -> list[JudgedResponse]:
    """The held-out prompts of all stages, each once."""
    return one_each(record for part in parts for record in part.held_out)


def families(
    held_out: Sequence[JudgedResponse], by: Family, stages: Sequence[PlannedStage], parts: Sequence[StagePrompts]
) -> dict[str, list[int]]:
    """Places of the ``held_out`` prompts by family. By stage and by tag, a prompt may belong to several."""
    members: dict[str, list[int]] = {}
    if by == "stage":
        own = {stage.name: set(map(_key, part.held_out)) for stage, part in zip(stages, parts, strict=True)}
        names = [[name for name, keys in own.items() if _key(record) in keys] for record in held_out]
    elif by == "source":
        names = [[record.source or NO_SOURCE] for record in held_out]
    else:
        names = [_tags(record) or [NO_TAG] for record in held_out]
    for place, own_names in enumerate(names):
        for name in own_names:
            members.setdefault(name, []).append(place)
    return members


def _tags(record: JudgedResponse) -> list[str]:
    return list(dict.fromkeys(tag for criterion in record.rubric.criteria for tag in criterion.tags))


def _key(record: JudgedResponse) -> tuple[str, str]:
    return record.prompt, record.rubric.id


def _check_apart(stages: Sequence[PlannedStage], parts: Sequence[StagePrompts]) -> None:
    """Raise UserError where stages disagree on what an id stands for, or on what is held out."""
    known: dict[tuple[str, str], tuple[object, str]] = {}
    pairs = list(zip(stages, parts, strict=True))
    for stage, part in pairs:
        for record in (*part.training, *part.held_out):
            for what, name, meaning in (
                ("prompt_id", record.prompt_id, record.prompt),
                ("response_id", record.response_id, _key(record)),
            ):
                first, where = known.setdefault((what, name), (meaning, stage.where))
                if first != meaning:
                    raise UserError(f"{stage.where}: {what} {name!r} is another one in {where}; rename one of them")
    held_out = {record.prompt: stage.where for stage, part in pairs for record in part.held_out}
    for stage, part in pairs:
        for record in part.training:
            if record.prompt in held_out:
                raise UserError(
                    f"{stage.where}: trains on the prompt {record.prompt_id!r}, which {held_out[record.prompt]} holds "
                    "out; give it one split"
                )
