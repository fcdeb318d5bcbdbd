"""The RL stage: TRL's PPO trains a policy with LoRA on the reward model's reward, watched by the judge.

Owns the order of the stage, what is logged and what is written; the reward is `policy.adapter`, the value model
`policy.critic`, the judge in the loop `policy.watching`, the before-and-after comparison `policy.evaluate`.

The run folder: config.json, metrics.jsonl (one row an update, written as it ends), adapter/ (LoRA weights and
tokenizer), best/step-N/ (the same of the policy with the best gold reward), samples.jsonl (the test prompts' responses
before and after), curves.png, result.json.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
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

from policy.adapter import Rollout, RubricRewardAdapter, Scorer
from policy.aggregation import check_rubrics
from policy.checkpoint import BestAdapter, save_adapter
from policy.config import PolicyConfig
from policy.critic import FrozenCritic
from policy.evaluate import PolicyEvaluation, evaluate_policy, mean_estimate, paired_difference
from policy.prompts import RubricPrompt, encode_prompt, rubric_prompts
from policy.step_rewards import NO_POSTERIOR, StepRewards, is_default
from policy.watching import DECLINE, GoldFell, GoldWatch, OnAlarm, planned_looks
from rm.backbone import load_causal_lm, load_tokenizer, native_dtype
from rm.fused import fuse
from rm.judging import build_judge
from rm.lora import attach_lora
from rm.metrics import Estimate
from rm.scorer import RubricScorer
from rubric_data.config import JudgeConfig
from rubric_data.errors import UserError
from rubric_data.files import atomic_path, start_run, write_json, write_text
from rubric_data.io import load_data
from rubric_data.judges import Judge
from rubric_data.programmatic import CodeFirst, is_programmatic
from rubric_data.verifiers import check_verifiers

logger = logging.getLogger(__name__)
TRL_RANGE = "trl>=1.8,<1.13"  # where TRL has PPO
_COUNTS = (
    "steps",
    "batch_size",
    "micro_batch_size",
    "ppo_epochs",
    "response_length",
    "critic_layers",
    "lora_rank",
    "gold_sample",
    "eval_samples",
)
_GOLD_LIMITS = ("reward/gold_low", "reward/gold_high")
Row = dict[str, Any]  # one line of metrics.jsonl: numbers, null, the name of an alarm


def run_ppo(config: PolicyConfig) -> dict[str, Any]:
    """Train the policy, evaluate it on the test prompts before and after, write everything into ``config.output``.

    Returns what result.json holds: gold and proxy reward before, after and their gain, each as
    ``{value, low, high}``, finished share and response length before and after, final KL, the alarm if there was one,
    steps and seconds.
    Raises UserError on bad input, before anything is written.
    """
    require_trl()
    check(config)
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
    if by_code == len(criteria):
        logger.warning(
            "%s: every criterion carries a verifier, so code gives the whole reward and the model is never asked; "
            "--use_verifiers false asks it",
            config.data,
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(config.policy)
    scorer = RubricScorer.from_pretrained(
        config.reward_model, device=device, use_verifiers=config.use_verifiers, reward=config.reward
    )
    if config.aggregation.pessimism and not scorer.tells_doubt:
        raise UserError(NO_POSTERIOR)
    adapter = RubricRewardAdapter(scorer, tokenizer, training, rewards)
    judge: Judge = build_judge(
        JudgeConfig(config.output, judge=config.judge, model=config.judge_model, base_url=config.judge_base_url)
    )
    if config.use_verifiers:
        judge = CodeFirst(judge)
    model = load_causal_lm(config.policy, dtype=native_dtype(device)).to(device)
    folder = start_run(config.output, asdict(config))

    started = time.perf_counter()
    before = _evaluate(config, model, tokenizer, held_out, judge, scorer)
    policy, rows = train(config, folder, model, tokenizer, training, adapter, judge)
    save_adapter(policy, tokenizer, folder / "adapter")
    after = _evaluate(config, policy, tokenizer, held_out, judge, scorer)
    result = {
        "prompts_trained": len(training),
        "prompts_evaluated": len(held_out),
        "responses_per_prompt": config.eval_samples,
        "criteria": len(criteria),
        "criteria_by_code": by_code,
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


def require_trl() -> ModuleType:
    """The module that holds TRL's PPO. Raises UserError if the installed TRL has none."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # that it may change is why its version is pinned
    try:
        import trl.experimental.ppo as ppo
    except ImportError as error:
        raise UserError(f"ppo: needs {TRL_RANGE} ({error}); run: pip install '{TRL_RANGE}'") from None
    return ppo


def check(config: PolicyConfig) -> None:
    """Raise UserError on values that would fail, or hang, later."""
    for name in _COUNTS:
        if getattr(config, name) < 1:
            raise UserError(f"{name}: must be at least 1, got {getattr(config, name)}; raise it")
    if config.eval_prompts is not None and config.eval_prompts < 1:
        raise UserError(f"eval_prompts: must be at least 1, got {config.eval_prompts}; raise it or leave it out")
    if config.batch_size % config.micro_batch_size:
        raise UserError(
            f"batch_size: {config.batch_size} is no multiple of micro_batch_size {config.micro_batch_size}; change one"
        )
    if config.lora_layers is not None and config.lora_layers < 1:
        raise UserError(f"lora_layers: must be at least 1, got {config.lora_layers}; raise it or leave it out")
    if config.temperature <= 0:
        raise UserError(f"temperature: must be positive, got {config.temperature}; PPO needs samples that differ")
    if config.reward != "proxy" and not is_default(config.aggregation):
        raise UserError(
            f"reward: {config.reward!r} is of the rubric's weighted mean, and aggregation pays something else; "
            "set reward to proxy, or leave aggregation at its defaults"
        )
    planned_looks(config.steps, gold_sample(config), config.gold_budget)


def gold_sample(config: PolicyConfig) -> int:
    """Rollouts of an update that are judged when it is looked at."""
    return min(config.gold_sample, config.batch_size)


def train(
    config: PolicyConfig,
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[RubricPrompt],
    adapter: RubricRewardAdapter,
    judge: Judge,
) -> tuple[PeftModel, list[Row]]:
    """PPO on ``prompts``; returns the policy with its LoRA adapter and the rows of metrics.jsonl."""
    ppo = require_trl()
    set_seed(config.seed)
    tokenizer.padding_side = "left"  # the response must follow the prompt directly
    # nothing of the model's own generation defaults (top_k, penalties) may bend the distribution PPO reasons about
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    critic = FrozenCritic(model, config.critic_layers)
    fuse(model)
    policy = attach_lora(
        model,
        model.get_decoder().layers,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        top_layers=config.lora_layers,
        task_type="CAUSAL_LM",
    )
    sample = gold_sample(config)
    watch = GoldWatch(
        judge,
        BestAdapter(policy, tokenizer, folder / "best"),
        steps=config.steps,
        sample=sample,
        looks=planned_looks(config.steps, sample, config.gold_budget),
        on_alarm=config.on_alarm,
        seed=config.seed,
    )
    log = StepLog(config, folder / "metrics.jsonl", adapter, watch)
    trainer = ppo.PPOTrainer(
        args=ppo_config(ppo, config, folder, on_cpu=model.device.type == "cpu"),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,  # the policy without its adapter
        reward_model=adapter,
        value_model=critic,
        train_dataset=prompt_dataset(tokenizer, prompts, config.batch_size),
        callbacks=[log],
    )
    trainer.remove_callback(PrinterCallback)
    with suppress(GoldFell):  # PPOTrainer looks at no flag that would end it
        trainer.train()
    return policy.eval(), log.rows


def ppo_config(ppo: ModuleType, config: PolicyConfig, folder: Path, *, on_cpu: bool) -> Any:
    """``config`` in TRL's words."""
    return ppo.PPOConfig(
        output_dir=str(folder),
        seed=config.seed,
        total_episodes=config.steps * config.batch_size,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.batch_size // config.micro_batch_size,
        local_rollout_forward_batch_size=config.batch_size,  # a smaller one would only generate more slowly
        num_ppo_epochs=config.ppo_epochs,
        response_length=config.response_length,
        temperature=config.temperature,
        stop_token="eos",
        missing_eos_penalty=config.missing_eos_penalty,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",  # a run is too short to anneal
        kl_coef=config.kl_coef,
        lam=config.gae_lambda,
        num_sample_generations=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=on_cpu,
        bf16=False,  # autocast; the weights are bfloat16 already where that is fast
        gradient_checkpointing=False,
    )


def prompt_dataset(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[RubricPrompt], batch_size: int) -> Dataset:
    """The prompts as token ids, repeated until they fill a batch: TRL drops a short one, and then waits for ever."""
    rows = [encode_prompt(tokenizer, prompt.prompt) for prompt in prompts]
    return Dataset.from_dict({"input_ids": rows * math.ceil(batch_size / len(rows))})


class StepLog(TrainerCallback):
    """One row for each update: into ``path`` at once, into ``rows``, and as a line on the terminal."""

    def __init__(self, config: PolicyConfig, path: Path, adapter: RubricRewardAdapter, watch: GoldWatch) -> None:
        self.rows: list[Row] = []
        self._config, self._path, self._adapter, self._watch = config, path, adapter, watch
        self._since = time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._since = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "objective/kl" not in logs:
            return
        now = time.perf_counter()
        rollouts = self._adapter.take_rollouts()
        gold = self._watch.look(state.global_step, rollouts)
        row = step_row(state.global_step, logs, rollouts, gold, seconds=now - self._since)
        self._since = now
        self.rows.append(row)
        with self._path.open("a", encoding="utf-8") as file:  # flushed on closing: a killed run keeps its rows
            file.write(json.dumps(row, allow_nan=False) + "\n")
        print(progress_line(row, self._config.steps), flush=True)
        self._watch.act()  # last, so that the update that ends a run is on record


def step_row(step: int, logs: dict[str, float], rollouts: Sequence[Rollout], gold: Row, *, seconds: float) -> Row:
    """One row of metrics.jsonl. ``logs`` is TRL's own; ``gold`` is what the judge made of the rollouts."""
    proxy = [rollout.reward for rollout in rollouts]
    return {
        "step": step,
        "episode": int(logs["episode"]),
        "reward/proxy": _mean(proxy),
        "reward/paid": _mean(rollout.paid for rollout in rollouts),
        "reward/masked": sum(math.isnan(rollout.paid) for rollout in rollouts),
        **gold,
        "kl": logs["objective/kl"],
        "entropy": logs["objective/entropy"],
        "response_tokens": _mean([rollout.tokens for rollout in rollouts]),
        "finished_share": _mean([rollout.finished for rollout in rollouts]),
        "clip_share": logs["policy/clipfrac_avg"],
        "value_loss": logs["loss/value_avg"],
        "seconds": round(seconds, 3),
    }


def progress_line(row: Row, steps: int) -> str:
    """A row for the terminal."""
    shown = {key: "-" if row[key] is None else f"{row[key]:.3f}" for key in ("reward/proxy", "reward/gold")}
    return (
        f"step {row['step']:>3}/{steps}  proxy {shown['reward/proxy']}  gold {shown['reward/gold']}  "
        f"kl {row['kl']:6.2f}  tokens {row['response_tokens']:5.1f}  finished {row['finished_share']:4.0%}  "
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
            {"text": one.text, "finished": one.finished, "gold": _number(gold), "proxy": _number(proxy)}
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


def _evaluate(
    config: PolicyConfig,
    model: Any,  # PreTrainedModel, or PeftModel, which passes its calls on to one
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[RubricPrompt],
    judge: Judge,
    scorer: Scorer,
) -> PolicyEvaluation:
    return evaluate_policy(
        model,
        tokenizer,
        prompts,
        judge=judge,
        scorer=scorer,
        samples=config.eval_samples,
        max_new_tokens=config.response_length,
        temperature=config.temperature,
        seed=config.seed,
        progress=True,
    )


def _mean(values: Iterable[float]) -> float | None:
    """Mean of what is not NaN; None if nothing is left."""
    known = [float(value) for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else None


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _estimate(found: Estimate) -> dict[str, float | None]:
    return {name: _number(value) for name, value in asdict(found).items()}
