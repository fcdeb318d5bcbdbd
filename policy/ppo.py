"""The RL stage: TRL's PPO trains a policy with LoRA on the reward model's reward, watched by the judge.

Owns PPO's trainer, its settings and what it alone logs; the reward is `policy.adapter`, the value model
`policy.critic`, everything around the trainer `policy.stage`.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback

from policy.adapter import Rollout, RubricRewardAdapter
from policy.config import PolicyConfig
from policy.critic import FrozenCritic
from policy.prompts import RubricPrompt, encode_prompt
from policy.stage import (
    METRICS,
    Cast,
    Row,
    StepLog,
    check,
    gold_watch,
    load,
    lora_shape,
    prepare,
    run_around,
    train_watched,
    trainer_arguments,
)
from rm.fused import fuse
from rm.lora import attach_lora
from rubric_data.errors import UserError
from rubric_data.files import start_run

TRL_RANGE = "trl>=1.8,<1.13"  # where TRL has PPO


def run_ppo(config: PolicyConfig) -> dict[str, Any]:
    """Train the policy, evaluate it on the test prompts before and after, write everything into ``config.output``.

    Returns what result.json holds: gold and proxy reward before, after and their gain, each as
    ``{value, low, high}``, finished share and response length before and after, final KL, the alarm if there was one,
    steps and seconds.
    Raises UserError on bad input, before anything is written.
    """
    check_ppo(config)
    cast = load(config)
    adapter = RubricRewardAdapter(cast.scorer, cast.tokenizer, cast.training, cast.rewards)
    folder = start_run(config.output, asdict(config))
    return run_around(config, cast, folder, lambda: train(config, folder, cast, adapter))


def check_ppo(config: PolicyConfig) -> None:
    """Raise UserError on values that would fail later, and if the installed TRL has no PPO."""
    require_trl()
    check(config, ("ppo_epochs", "critic_layers"))


def require_trl() -> ModuleType:
    """The module that holds TRL's PPO. Raises UserError if the installed TRL has none."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # that it may change is why its version is pinned
    try:
        import trl.experimental.ppo as ppo
    except ImportError as error:
        raise UserError(f"ppo: needs {TRL_RANGE} ({error}); run: pip install '{TRL_RANGE}'") from None
    return ppo


def train(config: PolicyConfig, folder: Path, cast: Cast, adapter: RubricRewardAdapter) -> tuple[PeftModel, list[Row]]:
    """PPO on the training prompts; returns the policy with its LoRA adapter and the rows of metrics.jsonl."""
    model, tokenizer = cast.model, cast.tokenizer
    ppo = require_trl()
    prepare(config, cast)
    critic = FrozenCritic(model, config.critic_layers)
    fuse(model)
    policy = attach_lora(model, **lora_shape(config, model))
    watch = gold_watch(config, cast, policy, folder)
    log = StepLog(config, folder / METRICS, watch, adapter.take_rollouts, describe)
    trainer = ppo.PPOTrainer(
        args=ppo_config(ppo, config, folder, cast),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,  # the policy without its adapter
        reward_model=adapter,
        value_model=critic,
        train_dataset=prompt_dataset(tokenizer, cast.training, config.batch_size),
        callbacks=[log],
    )
    trainer.remove_callback(PrinterCallback)
    train_watched(trainer.train)
    return policy.eval(), log.rows


def ppo_config(ppo: ModuleType, config: PolicyConfig, folder: Path, cast: Cast) -> Any:
    """``config`` in TRL's words."""
    return ppo.PPOConfig(
        output_dir=str(folder),
        total_episodes=config.steps * config.batch_size,
        local_rollout_forward_batch_size=config.batch_size,  # a smaller one would only generate more slowly
        num_ppo_epochs=config.ppo_epochs,
        response_length=config.response_length,
        stop_token="eos",
        missing_eos_penalty=config.missing_eos_penalty,
        kl_coef=config.kl_coef,
        lam=config.gae_lambda,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        **trainer_arguments(config, cast),
    )


def prompt_dataset(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[RubricPrompt], batch_size: int) -> Dataset:
    """The prompts as token ids, repeated until they fill a batch: TRL drops a short one, and then waits for ever."""
    rows = [encode_prompt(tokenizer, prompt.prompt) for prompt in prompts]
    return Dataset.from_dict({"input_ids": rows * math.ceil(batch_size / len(rows))})


def describe(logs: dict[str, float], rollouts: Sequence[Rollout]) -> Row:
    """What PPO alone can tell of an update; ``logs`` is TRL's own."""
    return {
        "kl": logs["objective/kl"],
        "entropy": logs["objective/entropy"],
        "clip_share": logs["policy/clipfrac_avg"],
        "value_loss": logs["loss/value_avg"],
    }
