"""A curriculum: stages of RL one after the other, each on the policy that the one before has left.

Owns their order, what is done before each (its prompts chosen, and filtered by the policy that it begins with), and
what an interrupted curriculum goes on from. What a recipe means is `policy.plan`, whom a stage trains on
`policy.stage_prompts`, the training `policy.ppo` and `policy.group`, the closing report `policy.curriculum_report`.

The folder: config.json (the stages as resolved), held_out.jsonl (what all stages are measured on), for each stage
prompts/<number>-<name>/ (data.jsonl, which it reads; with a filter responses.jsonl and filter/; report.json, written
last) and <number>-<name>/ (the run folder of its algorithm), curriculum.json.
"""

import gc
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from policy.aggregation import check_rubrics
from policy.config import CurriculumConfig, PromptFilter
from policy.curriculum_report import outcome, show, summarise
from policy.group import check_groups, run_grpo, run_rloo
from policy.online_dpo import check_pairs, run_online_dpo
from policy.plan import PlannedStage, differing, plan
from policy.ppo import check_ppo, run_ppo
from policy.prompts import require_pad
from policy.run_folder import RESULT
from policy.stage import processes
from policy.stage_prompts import StagePrompts, all_held_out, families, gather
from policy.step_rewards import StepRewards
from rm.backbone import load_causal_lm, load_tokenizer, native_dtype
from rm.config import FilterConfig
from rm.filtering import check_thresholds, run_filter
from rm.sampling import sample
from rubric_data.errors import UserError
from rubric_data.files import CONFIG_NAME, start_run, write_json
from rubric_data.io import read_judged, write_judged
from rubric_data.records import JudgedResponse
from rubric_data.verifiers import check_verifiers

# of each algorithm: what checks its options, and what runs it
_COMMANDS: dict[str, tuple[Callable[[Any], None], Callable[[Any], Any]]] = {
    "ppo": (check_ppo, run_ppo),
    "grpo": (check_groups, run_grpo),
    "rloo": (check_groups, run_rloo),
    "online-dpo": (check_pairs, run_online_dpo),
}
_FREE = ("policy", "eval_prompts", "families", "stages")  # each stage sees to its own on --resume


def run_curriculum(config: CurriculumConfig) -> dict[str, Any]:
    """Run every stage that is not finished yet; write curriculum.json into ``config.output``, show its tables.

    Returns what curriculum.json holds (docs/curricula.md names every key). Raises UserError on bad input, naming the
    stage, before anything is written; on what only shows later, such as a filter that leaves no prompt, when it shows.
    """
    if processes().num_processes > 1:
        raise UserError("curriculum: runs in one process; start it without torchrun, or each stage by its own command")
    stages = plan(config)
    parts = gather(stages, _limit(config))
    for stage, part in zip(stages, parts, strict=True):
        with _naming(stage):
            check_stage(stage, part)
    resolved = {**asdict(config), "stages": [asdict(stage) for stage in stages]}
    del resolved["common"]  # each stage has its part of it
    folder = start_run(config.output, resolved, resume=config.resume, free=_FREE)
    held_out = all_held_out(parts)
    settle_held_out(folder / "held_out.jsonl", held_out)
    del resolved["resume"]
    write_json(folder / CONFIG_NAME, resolved)  # stages to come may be others than when it began

    console = Console()
    chosen = []
    for stage, part in zip(stages, parts, strict=True):
        console.rule(f"stage {stage.number} of {len(stages)}: {stage.name} ({stage.algorithm})")
        with _naming(stage):
            chosen.append(prepare(stage, part, held_out))
            train(stage, console)
    members = families(held_out, config.families, stages, parts)
    outcomes = [outcome(stage, counts, held_out) for stage, counts in zip(stages, chosen, strict=True)]
    report = {
        **summarise(outcomes, members, by=config.families, differing=differing(stages)),
        "policy": stages[-1].left,
    }
    write_json(folder / "curriculum.json", report)
    show(report)
    console.print(f"policy: {report['policy']}, report: {folder / 'curriculum.json'}", soft_wrap=True, markup=False)
    return report


def check_stage(stage: PlannedStage, part: StagePrompts) -> None:
    """Raise UserError on what would stop ``stage`` later, as far as it can be told without its models."""
    check, _ = _COMMANDS[stage.algorithm]
    check(stage.run)
    if not Path(stage.run.reward_model).is_dir():
        raise UserError(f"reward_model: {stage.run.reward_model}: no such folder; give the model folder of a training")
    if stage.filter is not None:
        if stage.filter.samples < 2:
            raise UserError(f"filter.samples: must be at least 2, got {stage.filter.samples}; one has no spread")
        check_thresholds(_filter_config(stage, stage.filter))
    rewards = StepRewards(stage.run.aggregation, stage.run.seed)
    check_rubrics(rewards.aggregate, (record.rubric for record in part.training))
    if stage.run.use_verifiers:
        check_verifiers([*part.training, *part.held_out])


def prepare(stage: PlannedStage, part: StagePrompts, held_out: Sequence[JudgedResponse]) -> dict[str, Any]:
    """Write the prompts that ``stage`` reads, unless that is done; how many were chosen, kept, and dropped by reason.

    Raises UserError where it was done on other terms, and where the filter leaves no prompt.
    """
    folder, report = stage.prompts_folder, stage.prompts_folder / "report.json"
    terms = _terms(stage)
    if report.is_file():
        start_run(folder, terms, resume=True)
        return dict(json.loads(report.read_text(encoding="utf-8")))
    shutil.rmtree(folder, ignore_errors=True)
    start_run(folder, terms)
    decisions = ["kept"] * len(part.training)
    if stage.filter is not None:
        decisions = _decisions(stage, stage.filter, part.training)
    kept = [record for record, decision in zip(part.training, decisions, strict=True) if decision == "kept"]
    write_judged(stage.run.data, [*kept, *held_out])
    dropped = Counter(decision for decision in decisions if decision != "kept")
    counts = {"chosen": len(part.training), "kept": len(kept), "dropped": dict(sorted(dropped.items()))}
    write_json(report, counts)
    return counts


def train(stage: PlannedStage, console: Console) -> None:
    """Run ``stage`` to its end; where it is finished, only make sure that it was the same stage."""
    if (stage.folder / RESULT).is_file():  # it is written when all else is
        start_run(stage.folder, asdict(stage.run), resume=True)
        console.print(f"finished before: {stage.folder}", soft_wrap=True, markup=False)
        return
    _, run = _COMMANDS[stage.algorithm]
    run(stage.run)
    gc.collect()  # models that refer to themselves: the next stage loads its own
    torch.cuda.empty_cache()


def _decisions(stage: PlannedStage, wanted: PromptFilter, training: Sequence[JudgedResponse]) -> list[str]:
    """What the filter says of each prompt: "kept", or why not (`rubric_data.selection.REASONS`)."""
    write_judged(stage.prompts_folder / "responses.jsonl", _answered(stage, wanted, training))
    filtered = _filter_config(stage, wanted)
    run_filter(filtered)
    lines = Path(filtered.output, "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    by_id = {line["prompt_id"]: line["decision"] for line in map(json.loads, lines)}
    return [by_id[record.prompt_id] for record in training]


def _answered(stage: PlannedStage, wanted: PromptFilter, training: Sequence[JudgedResponse]) -> list[JudgedResponse]:
    """``training`` with responses of the policy that the stage begins with, ``wanted.samples`` to each."""
    run = stage.run
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(run.policy)
    require_pad(tokenizer)
    rows = sample(
        load_causal_lm(run.policy, dtype=native_dtype(device)).to(device),
        tokenizer,
        [record.prompt for record in training],
        samples=wanted.samples,
        max_new_tokens=run.response_length,
        temperature=run.temperature,
        seed=run.seed,
        progress=True,
    )
    return [
        record.model_copy(
            update={
                "response_id": f"{record.response_id}-s{number}",
                "response": one.text,
                "generator": run.policy,
                "verdicts": (),
                "preference": None,
                "split": "train",  # the filter passes on what is for validation, and RL trains on that as well
            }
        )
        for record, row in zip(training, rows, strict=True)
        for number, one in enumerate(row)
    ]


def _filter_config(stage: PlannedStage, wanted: PromptFilter) -> FilterConfig:
    """The filter of ``stage`` as `data filter` would be told."""
    return FilterConfig(
        output=str(stage.prompts_folder / "filter"),
        data=str(stage.prompts_folder / "responses.jsonl"),
        reward_model=stage.run.reward_model,
        low=wanted.low,
        high=wanted.high,
        min_spread=wanted.min_spread,
        use_verifiers=stage.run.use_verifiers,
    )


def _terms(stage: PlannedStage) -> dict[str, Any]:
    """What the prompts of ``stage`` depend on."""
    filtered = ("policy", "reward_model", "use_verifiers", "response_length", "temperature", "seed")
    return {
        "data": stage.data,
        "prompts": asdict(stage.prompts),
        "filter": None if stage.filter is None else asdict(stage.filter),
        **({} if stage.filter is None else {name: getattr(stage.run, name) for name in filtered}),
    }


def settle_held_out(path: Path, held_out: Sequence[JudgedResponse]) -> None:
    """Write the held-out prompts; raise UserError if other ones were there."""
    if not path.is_file():
        write_judged(path, held_out)
    elif read_judged(path) != list(held_out):
        raise UserError(
            f"{path}: the held-out prompts were others when this curriculum began, and stages must be measured alike; "
            "give the stages the data, prompts and eval_prompts of then, or choose another --output"
        )


def _limit(config: CurriculumConfig) -> int | None:
    if config.eval_prompts is not None and config.eval_prompts < 1:
        raise UserError(f"eval_prompts: must be at least 1, got {config.eval_prompts}; raise it or leave it out")
    return config.eval_prompts


@contextmanager
def _naming(stage: PlannedStage) -> Iterator[None]:
    """Have a UserError say in which stage it came up."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{stage.where}: {error}") from None
