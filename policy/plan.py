"""The recipe of a curriculum as stages: what its YAML says, checked, each with the whole configuration of its run.

Runs nothing, reads no data, and never imports torch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from policy.config import (
    CurriculumConfig,
    GrpoConfig,
    OnlineDpoConfig,
    PolicyConfig,
    PromptChoice,
    PromptFilter,
    RlConfig,
    RlooConfig,
)
from policy.options import Option, check_content, from_content, options_of
from rubric_data.errors import UserError

ALGORITHMS: dict[str, type[RlConfig]] = {
    "ppo": PolicyConfig,
    "grpo": GrpoConfig,
    "rloo": RlooConfig,
    "online-dpo": OnlineDpoConfig,
}
_OF_ALL = ("output", "policy", "eval_prompts", "resume")  # options of the curriculum, not of a stage
_SAME = ("judge", "judge_model", "judge_base_url", "eval_samples")  # in all stages, or gold could not be compared
_SECTIONS = ("prompts", "filter")
_OF_A_STAGE = ("name", "algorithm", *_SECTIONS)
_NAME = re.compile(r"\w[\w.-]*")  # part of a folder's name


@dataclass(frozen=True)
class PlannedStage:
    """One stage: where its prompts come from, which of them it takes, and the configuration of its run.

    ``run.data`` is the file that the curriculum writes for it; ``data`` is what the recipe names.
    """

    number: int
    name: str
    algorithm: str
    data: str
    prompts: PromptChoice
    filter: PromptFilter | None
    run: RlConfig

    @property
    def where(self) -> str:
        """How an error names it."""
        return _where(self.number, self.name)

    @property
    def folder(self) -> Path:
        """Of its run."""
        return Path(self.run.output)

    @property
    def left(self) -> str:
        """The policy it ends with: an adapter, or, where all weights are trained, a model."""
        return str(self.folder / ("adapter" if self.run.lora_rank else "model"))

    @property
    def prompts_folder(self) -> Path:
        """Of its prompts: the file of them, and how they were filtered."""
        return Path(self.run.data).parent


def plan(config: CurriculumConfig) -> list[PlannedStage]:
    """The stages that ``config`` describes, in their order. Raises UserError, naming the stage, on what is wrong."""
    if not config.stages:
        raise UserError("stages: there are none; give at least one, with a name and an algorithm")
    heads = [_head(number, {**config.common, **stage}) for number, stage in enumerate(config.stages, start=1)]
    _check_common(config.common, [algorithm for _, algorithm in heads])
    stages: list[PlannedStage] = []
    for number, (name, algorithm) in enumerate(heads, start=1):
        if any(name == stage.name for stage in stages):
            raise UserError(f"{_where(number, name)}: another stage has this name; give it its own")
        policy = stages[-1].left if stages else config.policy
        stages.append(_stage(config, number, name, algorithm, policy))
    return stages


def differing(stages: Sequence[PlannedStage]) -> list[str]:
    """Options that gold depends on and that the stages do not share, so that they compare badly."""
    by_code = all(stage.run.judge == "verifier" for stage in stages)  # whatever is asked of the reward model
    names = ["response_length", "temperature", "seed", *([] if by_code else ["use_verifiers"])]
    return [name for name in names if len({getattr(stage.run, name) for stage in stages}) > 1]


def _where(number: int, name: str) -> str:
    return f"stage {number} ({name})"


def _head(number: int, stage: Mapping[str, Any]) -> tuple[str, str]:
    """Name and algorithm of a stage."""
    name, algorithm = stage.get("name"), stage.get("algorithm")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"stage {number}: 'name' must be letters, digits, '.', '-' and '_', got {name!r}; give one")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        among = ", ".join(ALGORITHMS)
        raise UserError(f"{_where(number, name)}: 'algorithm' must be one of {among}, got {algorithm!r}; give one")
    return name, algorithm


def _check_common(common: Mapping[str, Any], algorithms: Sequence[str]) -> None:
    """Raise UserError at a key of ``common`` that no stage could have."""
    if "name" in common:
        raise UserError("common: 'name' is each stage's own; move it there")
    _check_not_of_all("common", common)
    known: dict[str, Option] = {}
    for algorithm in algorithms:
        known |= {option.key: option for option in options_of(ALGORITHMS[algorithm])}
    check_content("common", {key: value for key, value in common.items() if key not in _OF_A_STAGE}, known)


def _check_not_of_all(where: str, content: Mapping[str, Any]) -> None:
    for key in _OF_ALL:
        if key in content:
            raise UserError(f"{where}: '{key}' is of the whole curriculum; move it out, beside 'stages'")


def _stage(config: CurriculumConfig, number: int, name: str, algorithm: str, policy: str) -> PlannedStage:
    said, where, label = config.stages[number - 1], _where(number, name), f"{number}-{name}"
    _check_not_of_all(where, said)
    for key in _SAME:
        if key in said:
            raise UserError(f"{where}: '{key}' must be the same in all stages; move it to 'common'")
    kind = ALGORITHMS[algorithm]
    known = {field.name for field in fields(kind)}
    content = _laid_over({key: value for key, value in config.common.items() if key in known or key in _SECTIONS}, said)
    own = {
        "output": str(Path(config.output, label)),
        "policy": policy,
        "eval_prompts": None,  # those in the file that the curriculum writes
        "resume": True,  # whatever an interrupted run has left
    }
    options = {key: value for key, value in content.items() if key not in _OF_A_STAGE}
    run = from_content(kind, options, where, own)
    data, run.data = run.data, str(Path(config.output, "prompts", label, "data.jsonl"))
    prompts, wanted = (_section(content, key, where) for key in _SECTIONS)
    return PlannedStage(
        number=number,
        name=name,
        algorithm=algorithm,
        data=data,
        prompts=from_content(PromptChoice, prompts or {}, f"{where}, prompts"),
        filter=None if wanted is None else from_content(PromptFilter, wanted, f"{where}, filter"),
        run=run,
    )


def _section(content: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any] | None:
    """The options below ``key``; None where there is nothing, or null."""
    section = content.get(key)
    if section is not None and not isinstance(section, Mapping):
        raise UserError(f"{where}: '{key}' is a section; indent its options below it")
    return section


def _laid_over(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """``own`` over ``common``, section by section."""
    both = {key: _laid_over(common[key], own[key]) for key in own if _is_section(common.get(key), own[key])}
    return {**common, **own, **both}


def _is_section(*values: object) -> bool:
    return all(isinstance(value, Mapping) for value in values)
