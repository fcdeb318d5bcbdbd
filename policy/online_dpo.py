"""RL from pairs: TRL's online DPO trains a policy on which of two rollouts the reward model pays better.

Owns the settings and what online DPO alone logs; the trainer is `policy.dpo_trainer`, how it is run `policy.group`,
everything around it `policy.stage`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from policy.adapter import Rollout
from policy.config import OnlineDpoConfig
from policy.group import RecordedReward, run_by, run_settings
from policy.prompts import prompt_order
from policy.reward import reward_dataset
from policy.stage import Cast, Row, check, experimental, lora_shape, number_of, trainer_arguments
from rm.lora import lora_config
from rubric_data.errors import UserError


def run_online_dpo(config: OnlineDpoConfig) -> dict[str, Any]:
    """As `policy.ppo.run_ppo`, by online DPO. Raises UserError on bad input, before anything is written."""
    check_pairs(config)
    return run_by(config, build_trainer, describe)


def require_trl() -> ModuleType:
    """`policy.dpo_trainer`. Raises UserError if the installed TRL has no online DPO."""
    return experimental("online-dpo", "policy.dpo_trainer")


def check_pairs(config: OnlineDpoConfig) -> None:
    """Raise UserError on values that would fail later, and if the installed TRL has no online DPO.

    A pass must not split a pair, and something must hold the policy to where it started.
    """
    require_trl()
    check(config)
    if config.micro_batch_size % 2:
        raise UserError(
            f"micro_batch_size: {config.micro_batch_size} is odd, and two rollouts of a prompt are compared; make it "
            "even"
        )
    if config.beta <= 0:
        raise UserError(f"beta: must be positive, got {config.beta}; the smaller, the further the policy may go")


def build_trainer(config: OnlineDpoConfig, folder: Path, cast: Cast, reward: RecordedReward) -> Any:
    """The trainer with ``config`` in TRL's words; checkpoints go into ``folder``."""
    trainers = require_trl()
    shared = trainer_arguments(config, cast) | run_settings(config, folder)
    shared["per_device_train_batch_size"] = config.micro_batch_size // 2  # TRL counts prompts here
    return trainers.PairTrainer(
        model=cast.model,
        reward_funcs=reward,
        mask_unfinished=config.mask_unfinished,
        args=trainers.OnlineDPOConfig(
            train_sampling_strategy="sequential",  # it is in order already
            max_new_tokens=config.response_length,
            max_length=sys.maxsize,  # a shorter one would cut prompts, and score completions as if they had none
            beta=config.beta,
            loss_type=config.loss,
            **shared,
        ),
        processing_class=cast.tokenizer,
        train_dataset=reward_dataset(
            cast.training, prompt_order(len(cast.training), config.steps * config.batch_size // 2, seed=config.seed)
        ),
        # the adapter comes from here, so that the reference is the policy without it, and no second one is made
        peft_config=lora_config(cast.model, **lora_shape(config, cast.model)) if config.lora_rank else None,
    )


def describe(logs: dict[str, float], rollouts: Sequence[Rollout]) -> Row:
    """What online DPO alone can tell of an update; ``logs`` is TRL's own, whose KL and entropy are per rollout."""
    return {
        "kl": number_of(logs.get("objective/kl")),
        "entropy": number_of(logs.get("objective/entropy")),
        "loss": number_of(logs.get("loss")),
        "pair_margin": number_of(logs.get("pairs/margin")),
        "same_reward_share": number_of(logs.get("pairs/same_reward")),
        "grad_norm": number_of(logs.get("grad_norm")),
    }
