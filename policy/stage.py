"""What every RL command does around its trainer: load, evaluate before and after, log each update, write the folder.

Owns what the commands share, so that their numbers mean the same. The trainers are TRL's, put to work by `policy.ppo`
and `policy.group`; what a policy's responses are worth is `policy.evaluate`, what they are paid `policy.step_rewards`,
the judge in the loop `policy.watching`.

The run folder: config.json, metrics.jsonl (one row an update, written as it ends), adapter/ (LoRA weights and
tokenizer), best/step-N/ (the same of the policy with the best gold reward), judged.jsonl and scores.jsonl (the rollouts
that were judged: `policy.rollouts`), samples.jsonl (the test prompts' responses before and after), curves.png,
result.json.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from policy.adapter import Rollout
from policy.aggregation import check_rubrics
from policy.checkpoint import BestAdapter, save_adapter
from policy.config import RlConfig
from policy.evaluate import PolicyEvaluation, evaluate_policy, mean_estimate, paired_difference
from policy.prompts import RubricPrompt, rubric_prompts, warn_if_code_answers_all
from policy.rollouts import JudgedRollouts
from policy.step_rewards import NO_POSTERIOR, StepRewards, is_default
from policy.watching import DECLINE, GoldFell, GoldWatch, OnAlarm, planned_looks
from rm.backbone import load_causal_lm, load_tokenizer, native_dtype
from rm.judging import build_judge
from rm.metrics import Estimate
from rm.scorer import RubricScorer
from rubric_data.config import JudgeConfig
from rubric_data.errors import UserError
from rubric_data.files import atomic_path, write_json, write_text
from rubric_data.io import load_data
from rubric_data.judges import Judge
from rubric_data.programmatic import CodeFirst, is_programmatic
from rubric_data.verifiers import check_verifiers

METRICS = "metrics.jsonl"
_COUNTS = (
    "steps",
    "batch_size",
    "micro_batch_size",
    "response_length",
    "lora_rank",
    "gold_sample",
    "eval_samples",
)
_GOLD_LIMITS = ("reward/gold_low", "reward/gold_high")
Row = dict[str, Any]  # one line of metrics.jsonl: numbers, null, the name of an alarm


@dataclass(frozen=True)
class Cast:
    """Who takes part in a run: prompts to train on and to evaluate, policy, reward model, what it pays, and judge.

    ``criteria`` counts those of all prompts, ``by_code`` those of them that code answers.
    """

    training: list[RubricPrompt]
    held_out: list[RubricPrompt]
    tokenizer: PreTrainedTokenizerBase
    scorer: RubricScorer
    rewards: StepRewards
    judge: Judge
    model: PreTrainedModel
    criteria: int
    by_code: int


def check(config: RlConfig, counts: Sequence[str] = ()) -> None:
    """Raise UserError on values that would fail, or hang, later; ``counts`` are further options that must be >= 1."""
    for name in (*_COUNTS, *counts):
        if getattr(config, name) < 1:
            raise UserError(f"{name}: must be at least 1, got {getattr(config, name)}; raise it")
    for name in ("eval_prompts", "lora_layers"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name}: must be at least 1, got {value}; raise it or leave it out")
    if config.batch_size % config.micro_batch_size:
        raise UserError(
            f"batch_size: {config.batch_size} is no multiple of micro_batch_size {config.micro_batch_size}; change one"
        )
    if config.temperature <= 0:
        raise UserError(f"temperature: must be positive, got {config.temperature}; RL needs samples that differ")
    if config.reward != "proxy" and not is_default(config.aggregation):
        raise UserError(
            f"reward: {config.reward!r} is of the rubric's weighted mean, and aggregation pays something else; "
            "set reward to proxy, or leave aggregation at its defaults"
        )
    planned_looks(config.steps, gold_sample(config), config.gold_budget)


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
    by_code = sum(map(is_programmatic, criteria)) if config.use_verifiers else 0
    if config.use_verifiers:
        warn_if_code_answers_all(config.data, criteria)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(config.policy)
    scorer = RubricScorer.from_pretrained(
        config.reward_model, device=device, use_verifiers=config.use_verifiers, reward=config.reward
    )
    if config.aggregation.pessimism and not scorer.tells_doubt:
        raise UserError(NO_POSTERIOR)
    judge: Judge = build_judge(
        JudgeConfig(config.output, judge=config.judge, model=config.judge_model, base_url=config.judge_base_url)
    )
    if config.use_verifiers:
        judge = CodeFirst(judge)
    model = load_causal_lm(config.policy, dtype=native_dtype(device)).to(device)
    return Cast(training, held_out, tokenizer, scorer, rewards, judge, model, len(criteria), by_code)


def run_around(
    config: RlConfig, cast: Cast, folder: Path, train: Callable[[], tuple[PeftModel, list[Row]]]
) -> dict[str, Any]:
    """Evaluate the policy, train it, evaluate it again, write everything into ``folder``; returns result.json.

    ``train`` gives the policy with its LoRA adapter, and the rows of metrics.jsonl.
    """
    started = time.perf_counter()
    before = evaluate(config, cast, cast.model)
    policy, rows = train()
    save_adapter(policy, cast.tokenizer, folder / "adapter")
    after = evaluate(config, cast, policy)
    result = {
        "prompts_trained": len(cast.training),
        "prompts_evaluated": len(cast.held_out),
        "responses_per_prompt": config.eval_samples,
        "criteria": cast.criteria,
        "criteria_by_code": cast.by_code,
        **compare(before, after, seed=config.seed),
        **ending(rows, config.on_alarm),
        "steps": len(rows),
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_per_step": round(float(np.median([row["seconds"] for row in rows])), 2),
    }
    write_samples(folder / "samples.jsonl", before, after)
    plot(folder / "curves.png", rows)
    write_json(folder / "result.json", result)
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
        "gradient_accumulation_steps": config.batch_size // config.micro_batch_size,
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


def gold_watch(config: RlConfig, cast: Cast, policy: PeftModel, folder: Path, done: int = 0) -> GoldWatch:
    """The judge's watch over ``policy``, after ``done`` updates; what it keeps is in the run's ``folder``."""
    sample = gold_sample(config)
    return GoldWatch(
        cast.judge,
        BestAdapter(policy, cast.tokenizer, folder / "best"),
        JudgedRollouts(folder, done),
        steps=config.steps,
        sample=sample,
        looks=planned_looks(config.steps, sample, config.gold_budget),
        on_alarm=config.on_alarm,
        seed=config.seed,
    )


def train_watched(train: Callable[[], Any]) -> None:
    """Call a trainer's ``train`` until it ends, or the watch ends it: PPOTrainer looks at no flag that would."""
    with suppress(GoldFell):
        train()


class StepLog(TrainerCallback):
    """One row for each update: into metrics.jsonl at once, into ``rows``, and as a line on the terminal.

    ``take_rollouts`` hands over what was scored since the last call, for ``watch`` to look at; ``describe`` gives what
    the trainer alone can tell of an update, from TRL's log of it and its rollouts. ``rows`` are of the updates before,
    where a run goes on. What ``watch`` knows goes into each checkpoint.
    """

    def __init__(
        self,
        config: RlConfig,
        path: Path,
        watch: GoldWatch,
        take_rollouts: Callable[[], list[Rollout]],
        describe: Callable[[dict[str, float], Sequence[Rollout]], Row],
        rows: Sequence[Row] = (),
    ) -> None:
        self.rows = list(rows)
        self._config, self._path, self._watch = config, path, watch
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
        rollouts = self._take_rollouts()
        if not logs or not rollouts:  # the closing log, which is of no update
            return
        now = time.perf_counter()
        gold = self._watch.look(state.global_step, rollouts)
        row = step_row(state.global_step, rollouts, gold, self._describe(logs, rollouts), seconds=now - self._since)
        self._since = now
        self.rows.append(row)
        with self._path.open("a", encoding="utf-8") as file:  # flushed on closing: a killed run keeps its rows
            file.write(json.dumps(row, allow_nan=False) + "\n")
        print(progress_line(row, self._config.steps), flush=True)
        self._watch.act()  # after the row, so that the update that ends a run is on record
        if control.should_save:  # before the trainer's files, so that no whole checkpoint lacks it
            self._watch.save(Path(args.output_dir, f"checkpoint-{state.global_step}"))


def step_row(step: int, rollouts: Sequence[Rollout], gold: Row, own: Row, *, seconds: float) -> Row:
    """One row of metrics.jsonl: ``own`` is the trainer's part; ``gold`` is what the judge made of the rollouts."""
    return {
        "step": step,
        "episode": step * len(rollouts),
        "reward/proxy": _mean(rollout.reward for rollout in rollouts),
        "reward/paid": _mean(rollout.paid for rollout in rollouts),
        "reward/masked": sum(math.isnan(rollout.paid) for rollout in rollouts),
        **gold,
        "response_tokens": _mean([rollout.tokens for rollout in rollouts]),
        "finished_share": _mean([rollout.finished for rollout in rollouts]),
        **own,
        "seconds": round(seconds, 3),
    }


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
    alarm, best = next((row["step"] for row in rows if row["alarm"] == DECLINE), None), rows[-1]["best_step"]
    rolled_back = alarm is not None and on_alarm == "rollback"
    last = next(row for row in rows if row["step"] == best) if rolled_back else rows[-1]
    return {"kl_final": last["kl"], "best_step": best, "alarm_step": alarm, "rolled_back": rolled_back}


def compare(before: PolicyEvaluation, after: PolicyEvaluation, *, seed: int) -> dict[str, Any]:
    """Both evaluations side by side; gains are paired by prompt (`policy.evaluate.paired_difference`)."""
    found: dict[str, Any] = {}
    for name in ("gold", "proxy"):
        first, second = getattr(before, f"{name}_P"), getattr(after, f"{name}_P")
        found[f"{name}_before"] = _estimate(mean_estimate(first, seed=seed))
        found[f"{name}_after"] = _estimate(mean_estimate(second, seed=seed))
        found[f"{name}_gain"] = _estimate(paired_difference(first, second, seed=seed))
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


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Proxy and gold reward, KL, and response length over the updates, as a PNG."""
    from matplotlib.figure import Figure  # not pyplot: it would choose a window system

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    reward, kl, length = figure.subplots(1, 3)
    panels = (
        (reward, "mean reward of the rollouts", (("reward/proxy", "reward model"), ("reward/gold", "judge"))),
        (kl, "KL to the starting policy (nats a response)", (("kl", ""),)),
        (length, "tokens a response", (("response_tokens", ""),)),
    )
    steps = [row["step"] for row in rows]
    for axes, title, lines in panels:
        for key, label in lines:
            heights = [math.nan if row[key] is None else row[key] for row in rows]
            dashes = "--" if key == "reward/gold" else "-"  # so that one line shows under the other
            axes.plot(steps, heights, dashes, marker="o", markersize=3, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("update")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    low, high = ([math.nan if row[key] is None else row[key] for row in rows] for key in _GOLD_LIMITS)
    reward.fill_between(steps, low, high, color="C1", alpha=0.15, linewidth=0)
    reward.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _mean(values: Iterable[float]) -> float | None:
    """Mean of what is not NaN; None if nothing is left."""
    known = [float(value) for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else None


def number_of(value: float | None, factor: float = 1.0) -> float | None:
    """``value`` times ``factor`` as JSON can hold it: None where there is none, or none that is finite."""
    return None if value is None or not math.isfinite(value) else float(value) * factor


def _estimate(found: Estimate) -> dict[str, float | None]:
    return {name: number_of(value) for name, value in asdict(found).items()}
