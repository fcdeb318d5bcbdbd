"""What every RL command does around its trainer: load, evaluate before and after, log each update, write the folder.

Owns what the commands share, so that their numbers mean the same. The trainers are TRL's, put to work by `policy.ppo`,
`policy.group` and `policy.online_dpo`; what a policy's responses are worth is `policy.evaluate`, what they are paid
`policy.step_rewards`, the judge in the loop `policy.watching`.

The run folder: config.json, metrics.jsonl (one row an update, written as it ends), adapter/ (LoRA weights and
tokenizer; of a run without LoRA model/), best/step-N/ (the same of the policy with the best gold reward), judged.jsonl
and scores.jsonl (the rollouts that were judged: `policy.rollouts`), samples.jsonl (the test prompts' responses before
and after), result.json; run.html, which shows it all from the first update on (`policy.run_page`); checkpoints/, from
which an interrupted run goes on.

Several processes share an update's rollouts. The first alone evaluates, asks the judge, logs and writes, of the
rollouts of all; the others train, and end when it does.
"""

import copy
import importlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations

from policy.adapter import Rollout
from policy.aggregation import check_rubrics
from policy.checkpoint import BestAdapter, Policy, save_adapter
from policy.config import RlConfig
from policy.evaluate import PolicyEvaluation, evaluate_policy, mean_estimate, paired_difference
from policy.fallback import ASKED, FAILED, asked_row, check_fallback, payer
from policy.prompts import RubricPrompt, rubric_prompts, warn_if_code_answers_all
from policy.reward import RubricScoring
from policy.rollouts import JudgedRollouts
from policy.run_digest import best_row, best_step, first_alarm
from policy.run_folder import METRICS, RESULT, SAMPLES, Row
from policy.run_page import LivePage, write_page
from policy.step_rewards import NO_POSTERIOR, StepRewards, is_default
from policy.tally import CriterionMeans, tallied
from policy.watching import DECLINE, GoldFell, GoldWatch, OnAlarm, planned_looks
from rm.backbone import load_causal_lm, load_tokenizer, native_dtype
from rm.judging import build_judge
from rm.metrics import Estimate
from rm.sampling import render_chat
from rm.scorer import RubricScorer
from rm.train import CHECKPOINTS, last_checkpoint
from rubric_data.config import JudgeConfig
from rubric_data.errors import UserError
from rubric_data.files import start_run, write_json, write_text
from rubric_data.io import load_data
from rubric_data.judges import Judge
from rubric_data.programmatic import CodeFirst, coded_in_rewards, is_coded
from rubric_data.verifiers import check_verifiers

_COUNTS = (
    "steps",
    "batch_size",
    "micro_batch_size",
    "response_length",
    "gold_sample",
    "eval_samples",
    "save_steps",
)
_FREE = ("steps", "save_steps", "report_to")  # what a resumed run may change
TRL_RANGE = "trl>=1.8,<1.13"  # where TRL has PPO
Describe = Callable[[dict[str, float], Sequence[Rollout]], Row]  # of TRL's log of an update and its rollouts
_PATIENCE = timedelta(days=1)  # of processes that wait while the first one evaluates


@dataclass(frozen=True)
class Cast:
    """Who takes part in a run: prompts to train on and to evaluate, policy, reward model, what it pays, and judge.

    ``payer`` is the reward model too, or asks the judge where that is in doubt (`policy.fallback`). ``criteria`` counts
    those of all prompts, ``by_code`` those of them that code answers.
    """

    training: list[RubricPrompt]
    held_out: list[RubricPrompt]
    tokenizer: PreTrainedTokenizerBase
    scorer: RubricScorer
    payer: RubricScoring
    rewards: StepRewards
    judge: Judge
    model: PreTrainedModel
    criteria: int
    by_code: int


def processes() -> PartialState:
    """The processes of this run: those that torchrun started, or this one alone."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)


def experimental(command: str, module: str) -> ModuleType:
    """The ``module`` that holds, or needs, a part of TRL that may move. Raises UserError if TRL lacks it."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # that it may change is why its version is pinned
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{command}: needs {TRL_RANGE} ({error}); run: pip install '{TRL_RANGE}'") from None


def check(config: RlConfig, counts: Sequence[str] = ()) -> None:
    """Raise UserError on values that would fail, or hang, later; ``counts`` are further options that must be >= 1."""
    for name in (*_COUNTS, *counts):
        if getattr(config, name) < 1:
            raise UserError(f"{name}: must be at least 1, got {getattr(config, name)}; raise it")
    for name in ("eval_prompts", "lora_layers"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name}: must be at least 1, got {value}; raise it or leave it out")
    share = processes().num_processes
    if config.batch_size % (config.micro_batch_size * share):
        each = f" in {share} processes" if share > 1 else ""
        raise UserError(
            f"batch_size: {config.batch_size} is no multiple of micro_batch_size {config.micro_batch_size}{each}; "
            "change one"
        )
    if share > 1 and config.aggregation.headroom:
        raise UserError(
            f"aggregation.headroom: weighs by what all rollouts have reached, which none of {share} processes sees; "
            "set it to 0, or train in one"
        )
    if config.lora_rank < 0:
        raise UserError(f"lora_rank: must be at least 0, got {config.lora_rank}; 0 trains all weights")
    if config.temperature <= 0:
        raise UserError(f"temperature: must be positive, got {config.temperature}; RL needs samples that differ")
    if config.reward != "proxy" and not is_default(config.aggregation):
        raise UserError(
            f"reward: {config.reward!r} is of the rubric's weighted mean, and aggregation pays something else; "
            "set reward to proxy, or leave aggregation at its defaults"
        )
    planned_looks(config.steps, gold_sample(config), config.gold_budget)
    check_fallback(config)
    check_reporter(config.report_to)


def check_reporter(name: str) -> None:
    """Raise UserError unless transformers can report to ``name`` here."""
    known = ("none", "all", *get_available_reporting_integrations())
    if name not in known:
        raise UserError(
            f"report_to: {name!r} is unknown or not installed; install it, or take one of {', '.join(known)}"
        )


def begin(config: RlConfig) -> Path:
    """The run folder: made by the first process or, to resume, as it is. Raises UserError where it may not be."""
    if processes().is_main_process:
        start_run(config.output, asdict(config), resume=config.resume, free=_FREE)
    return Path(config.output)


def gold_sample(config: RlConfig) -> int:
    """Rollouts of an update that are judged when it is looked at."""
    return min(config.gold_sample, config.batch_size)


def load(config: RlConfig) -> Cast:
    """Everybody that ``config`` names. Raises UserError on bad input; writes nothing."""
    records = load_data(config.data)
    training = rubric_prompts(record for record in records if record.split in ("train", "validation"))
    held_out = rubric_prompts(record for record in records if record.split == "test")[: config.eval_prompts]
    for prompts, splits in ((training, "train or validation"), (held_out, "test")):
        if not prompts:
            raise UserError(f"{config.data}: has no prompts in split {splits}; give the records' split field")
    rewards = StepRewards(config.aggregation, config.seed)
    check_rubrics(rewards.aggregate, (prompt.rubric for prompt in training))
    if config.use_verifiers:
        check_verifiers(records)
    criteria = [criterion for prompt in (*training, *held_out) for criterion in prompt.rubric.criteria]
    coded = coded_in_rewards(config.use_verifiers)
    by_code = sum(is_coded(criterion, coded) for criterion in criteria)
    if config.use_verifiers:
        warn_if_code_answers_all(config.data, criteria)
    device = str(processes().device)
    tokenizer = load_tokenizer(config.policy)
    for prompt in (*training, *held_out):
        render_chat(tokenizer, prompt.prompt)  # or the chat template would refuse it in the middle of the run
    scorer = RubricScorer.from_pretrained(config.reward_model, device=device, use_verifiers=coded, reward=config.reward)
    scorer.check(prompt.rubric for prompt in (*training, *held_out))
    if config.aggregation.pessimism and not scorer.tells_doubt:
        raise UserError(NO_POSTERIOR)
    judge: Judge = build_judge(
        JudgeConfig(config.output, judge=config.judge, model=config.judge_model, base_url=config.judge_base_url)
    )
    if config.use_verifiers or by_code:
        judge = CodeFirst(judge, coded)
    dtype = native_dtype(device) if config.lora_rank else torch.float32  # bfloat16 would lose what an update adds
    model = load_causal_lm(config.policy, dtype=dtype).to(device)
    paying = payer(config, scorer, judge, rewards)
    return Cast(training, held_out, tokenizer, scorer, paying, rewards, judge, model, len(criteria), by_code)


def run_around(
    config: RlConfig, cast: Cast, folder: Path, train: Callable[[], tuple[Policy, list[Row]]]
) -> dict[str, Any]:
    """Evaluate the policy, train it, evaluate it again, write everything into ``folder``; returns result.json.

    ``train`` gives the policy with what it has learnt, and the rows of metrics.jsonl. Processes other than the first
    only train, and return nothing.
    """
    if not processes().is_main_process:
        train()
        return {}
    started = time.perf_counter()
    before = evaluate(config, cast, cast.model)
    policy, rows = train()
    save_adapter(policy, cast.tokenizer, folder / ("adapter" if config.lora_rank else "model"))
    after = evaluate(config, cast, policy)
    result = {
        "prompts_trained": len(cast.training),
        "prompts_evaluated": len(cast.held_out),
        "responses_per_prompt": config.eval_samples,
        "criteria": cast.criteria,
        "criteria_by_code": cast.by_code,
        **compare(before, after, seed=config.seed),
        **ending(rows, config.on_alarm),
        "verdicts_asked": sum(row[ASKED] for row in rows),
        "verdicts_failed": sum(row[FAILED] for row in rows),
        "steps": len(rows),
        "processes": processes().num_processes,
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_per_step": round(float(np.median([row["seconds"] for row in rows])), 2),
    }
    write_samples(folder / SAMPLES, before, after)
    write_json(folder / RESULT, result)
    write_page(folder)
    return result


def lora_shape(config: RlConfig, model: PreTrainedModel) -> dict[str, Any]:
    """The policy's adapters, in the words of `rm.lora`."""
    return {
        "layers": model.get_decoder().layers,
        "rank": config.lora_rank,
        "alpha": config.lora_alpha,
        "top_layers": config.lora_layers,
        "task_type": "CAUSAL_LM",
    }


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The starting policy, where all weights of ``model`` are about to be trained."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def prepare(config: RlConfig, cast: Cast) -> None:
    """Seed everything, and let the policy sample as training needs it to."""
    set_seed(config.seed)
    tokenizer = cast.tokenizer
    tokenizer.padding_side = "left"  # the response must follow the prompt directly
    # without the model's own defaults: top_k or a penalty would bend what its log-probabilities say
    cast.model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )


def trainer_arguments(config: RlConfig, cast: Cast) -> dict[str, Any]:
    """What every trainer of TRL is told of ``config``, in its words."""
    return {
        "seed": config.seed,
        "per_device_train_batch_size": config.micro_batch_size,
        "gradient_accumulation_steps": config.batch_size // (config.micro_batch_size * processes().num_processes),
        "temperature": config.temperature,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant",  # a run is too short to anneal
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": cast.model.device.type == "cpu",
        "bf16": False,  # autocast; the weights are bfloat16 already where that is fast
        "gradient_checkpointing": False,
    }


def evaluate(
    config: RlConfig,
    cast: Cast,
    model: Any,  # PreTrainedModel, or PeftModel, which passes its calls on to one
) -> PolicyEvaluation:
    """What ``model``'s responses to the test prompts are worth; the same chance for every model of a run."""
    return evaluate_policy(
        model,
        cast.tokenizer,
        cast.held_out,
        judge=cast.judge,
        scorer=cast.scorer,
        samples=config.eval_samples,
        max_new_tokens=config.response_length,
        temperature=config.temperature,
        seed=config.seed,
        progress=True,
    )


def step_of(checkpoint: Path | None) -> int:
    """The update after which ``checkpoint`` was written; 0 where there is none."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def reached(folder: Path) -> tuple[Path | None, list[Row]]:
    """The last whole checkpoint of the run in ``folder``, and the rows until then; every process calls this.

    `begin` lets nobody else's be there. The first process looks, and takes later rows away: they will be made again.
    """
    found: list[Any] = [None]
    if processes().is_main_process:
        checkpoint = last_checkpoint(folder / CHECKPOINTS)
        found = [(checkpoint, rows_until(checkpoint, folder / METRICS))]
    return broadcast_object_list(found)[0]  # where the others wait for the folder


def rows_until(checkpoint: Path | None, path: Path) -> list[Row]:
    """The rows of ``path`` up to ``checkpoint``; the file loses those after it."""
    lines = path.read_text(encoding="utf-8").splitlines()[: step_of(checkpoint)] if path.exists() else []
    write_text(path, "".join(f"{line}\n" for line in lines))
    return [json.loads(line) for line in lines]


def gold_watch(config: RlConfig, cast: Cast, policy: Policy, folder: Path, checkpoint: Path | None = None) -> GoldWatch:
    """The judge's watch over ``policy``, from ``checkpoint`` on; what it keeps is in the run's ``folder``."""
    sample = gold_sample(config)
    watch = GoldWatch(
        cast.judge,
        BestAdapter(policy, cast.tokenizer, folder / "best"),
        JudgedRollouts(folder, step_of(checkpoint)),
        steps=config.steps,
        sample=sample,
        looks=planned_looks(config.steps, sample, config.gold_budget),
        on_alarm=config.on_alarm,
        seed=config.seed,
    )
    if checkpoint is not None:
        watch.load(checkpoint)
    return watch


def watched(
    config: RlConfig,
    cast: Cast,
    folder: Path,
    trainer: Any,
    policy: Policy,
    take_rollouts: Callable[[], list[Rollout]],
    describe: Describe,
    checkpoint: Path | None,
    rows: Sequence[Row],
) -> "tuple[StepLog | SilentStep, GoldWatch | None]":
    """The log that TRL's ``trainer`` now tells of every update, and the watch, which the first process alone has.

    It hears of an update before the reporters, who then get what it adds. The run goes on after ``rows``, from
    ``checkpoint``; the others are `StepLog`'s.
    """
    log: StepLog | SilentStep = SilentStep(take_rollouts)
    watch: GoldWatch | None = None
    if processes().is_main_process:
        watch = gold_watch(config, cast, policy, folder, checkpoint)
        log = StepLog(config, folder, cast.training, watch, take_rollouts, describe, rows)
    trainer.callback_handler.callbacks.insert(0, log)
    trainer.remove_callback(PrinterCallback)
    return log, watch


def train_watched(train: Callable[[], Any]) -> None:
    """Call a trainer's ``train`` until it ends, or the watch ends it: PPOTrainer looks at no flag that would."""
    with suppress(GoldFell):
        train()


class StepLog(TrainerCallback):
    """One row for each update: into the run's metrics.jsonl at once, into ``rows``, and as a line on the terminal.

    Keeps the run's page up to date, too. ``prompts`` are those trained on. ``take_rollouts`` hands over what was scored
    since the last call, for ``watch`` to look at; ``describe`` gives what the trainer alone can tell of an update, from
    TRL's log of it and its rollouts. ``rows`` are of the updates before, where a run goes on. What ``watch`` knows goes
    into each checkpoint that transformers writes. The numbers of a row join TRL's log, for the reporters.
    """

    def __init__(
        self,
        config: RlConfig,
        folder: Path,
        prompts: Sequence[RubricPrompt],
        watch: GoldWatch,
        take_rollouts: Callable[[], list[Rollout]],
        describe: Describe,
        rows: Sequence[Row] = (),
    ) -> None:
        self.rows = list(rows)
        self._config, self._path, self._watch = config, folder / METRICS, watch
        self._criteria = CriterionMeans(prompt.rubric for prompt in prompts)
        self._page = LivePage(folder)
        self._take_rollouts, self._describe = take_rollouts, describe
        self._since = time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._since = time.perf_counter()
        self._watch.begin()  # a checkpoint's weights are loaded by now

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        rollouts = gather_object(self._take_rollouts())
        if not logs or not rollouts:  # the closing log, which is of no update
            return
        now = time.perf_counter()
        gold = self._watch.look(state.global_step, rollouts)
        met = self._criteria.of(tallied((one.prompt.rubric, one.scored.probs) for one in rollouts))
        own = self._describe(logs, rollouts) | met
        row = step_row(state.global_step, rollouts, gold, own, seconds=now - self._since)
        self._since = now
        self.rows.append(row)
        logs.update(reported(row))
        with self._path.open("a", encoding="utf-8") as file:  # flushed on closing: a killed run keeps its rows
            file.write(json.dumps(row, allow_nan=False) + "\n")
        print(progress_line(row, self._config.steps), flush=True)
        self._since += self._page.refresh()  # which is no part of the next update
        with _telling_the_others():
            self._watch.act()  # after the row, so that the update that ends a run is on record
        if control.should_save:  # before the trainer's files, so that no whole checkpoint lacks it
            self._watch.save(Path(args.output_dir, f"checkpoint-{state.global_step}"))


class SilentStep(TrainerCallback):
    """The part of `StepLog` in processes other than the first: hand over what was scored, and end when the run does."""

    def __init__(self, take_rollouts: Callable[[], list[Rollout]]) -> None:
        self.rows: list[Row] = []
        self._take_rollouts = take_rollouts

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        rollouts = gather_object(self._take_rollouts())
        if logs and rollouts and broadcast_object_list([None])[0]:
            raise GoldFell


@contextmanager
def _telling_the_others() -> Iterator[None]:
    """The other processes hear, in `SilentStep`, whether the run ends with this block."""
    try:
        yield
    except GoldFell:
        broadcast_object_list([True])
        raise
    broadcast_object_list([False])


def step_row(step: int, rollouts: Sequence[Rollout], gold: Row, own: Row, *, seconds: float) -> Row:
    """One row of metrics.jsonl: ``own`` is the trainer's part; ``gold`` is what the judge made of the rollouts."""
    return {
        "step": step,
        "episode": step * len(rollouts),
        "reward/proxy": _mean(rollout.reward for rollout in rollouts),
        "reward/paid": _mean(rollout.paid for rollout in rollouts),
        "reward/masked": sum(math.isnan(rollout.paid) for rollout in rollouts),
        **asked_row(rollouts),
        **gold,
        "response_tokens": _mean([rollout.tokens for rollout in rollouts]),
        "finished_share": _mean([rollout.finished for rollout in rollouts]),
        **own,
        "reward_seconds": round(sum(rollout.seconds for rollout in rollouts), 3),
        "seconds": round(seconds, 3),
    }


def reported(row: Row) -> dict[str, float]:
    """The numbers of ``row`` under names of our own: TRL's log calls other things ``reward`` and ``kl``."""
    return {f"rubric_rm/{name}": value for name, value in row.items() if isinstance(value, (int, float))}


def progress_line(row: Row, steps: int) -> str:
    """A row for the terminal."""
    shown = {key: "-" if row[key] is None else f"{row[key]:.3f}" for key in ("reward/proxy", "reward/gold")}
    kl = "     -" if row["kl"] is None else f"{row['kl']:6.2f}"
    return (
        f"step {row['step']:>3}/{steps}  proxy {shown['reward/proxy']}  gold {shown['reward/gold']}  "
        f"kl {kl}  tokens {row['response_tokens']:5.1f}  finished {row['finished_share']:4.0%}  "
        f"{row['seconds']:.1f} s" + (f"  {row['alarm']}!" if row["alarm"] else "")
    )


def ending(rows: Sequence[Row], on_alarm: OnAlarm) -> Row:
    """How the updates ended: the KL of the policy that is left, the update with the best gold, the first decline."""
    alarm, best = first_alarm(rows, DECLINE), best_row(rows)
    rolled_back = alarm is not None and on_alarm == "rollback"
    last = best if rolled_back and best is not None else rows[-1]
    return {"kl_final": last["kl"], "best_step": best_step(rows), "alarm_step": alarm, "rolled_back": rolled_back}


def compare(before: PolicyEvaluation, after: PolicyEvaluation, *, seed: int) -> dict[str, Any]:
    """Both evaluations side by side; gains are paired by prompt (`policy.evaluate.paired_difference`)."""
    found: dict[str, Any] = {}
    for name in ("gold", "proxy"):
        first, second = getattr(before, f"{name}_P"), getattr(after, f"{name}_P")
        found[f"{name}_before"] = _estimate(mean_estimate(first, seed=seed))
        found[f"{name}_after"] = _estimate(mean_estimate(second, seed=seed))
        found[f"{name}_gain"] = _estimate(paired_difference(first, second, seed=seed))
    gold_P, proxy_P = after.gold_P - before.gold_P, after.proxy_P - before.proxy_P
    found["gain_gap"] = _estimate(paired_difference(gold_P, proxy_P, seed=seed))
    for name in ("finished_share", "mean_tokens"):
        found[f"{name}_before"], found[f"{name}_after"] = getattr(before, name), getattr(after, name)
    return found


def write_samples(path: Path, before: PolicyEvaluation, after: PolicyEvaluation) -> None:
    """One line a test prompt: its responses before and after with both rewards (null where masked)."""

    def responses(evaluation: PolicyEvaluation, place: int) -> list[dict[str, Any]]:
        columns = zip(evaluation.completions[place], evaluation.gold_PS[place], evaluation.proxy_PS[place], strict=True)
        return [
            {"text": one.text, "finished": one.finished, "gold": number_of(gold), "proxy": number_of(proxy)}
            for one, gold, proxy in columns
        ]

    lines = [
        {
            "prompt_id": prompt.prompt_id,
            "prompt": prompt.prompt,
            "before": responses(before, place),
            "after": responses(after, place),
        }
        for place, prompt in enumerate(before.prompts)
    ]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _mean(values: Iterable[float]) -> float | None:
    """Mean of what is not NaN; None if nothing is left."""
    known = [float(value) for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else None


def number_of(value: float | None, factor: float = 1.0) -> float | None:
    """``value`` times ``factor`` as JSON can hold it: None where there is none, or none that is finite."""
    return None if value is None or not math.isfinite(value) else float(value) * factor


def _estimate(found: Estimate) -> dict[str, float | None]:
    return {name: number_of(value) for name, value in asdict(found).items()}
