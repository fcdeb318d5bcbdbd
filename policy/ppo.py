"""The RL stage: TRL's PPO trains a policy on the reward model's reward, watched by the judge.

Owns PPO's trainer, its settings and what it alone logs; the reward is `policy.adapter`, the value model
`policy.critic`, its checkpoints `policy.ppo_checkpoint`, everything around the trainer `policy.stage`.

Several processes: `torchrun --nproc_per_node 2 -m policy.cli ppo ...`; see `policy.stage`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from policy.adapter import Rollout, RubricRewardAdapter
from policy.checkpoint import Policy
from policy.config import PolicyConfig
from policy.critic import FrozenCritic, build_critic
from policy.fallback import go_on
from policy.ppo_checkpoint import PpoCheckpoints
from policy.prompts import encode_prompt, prompt_order
from policy.stage import (
    Cast,
    Row,
    begin,
    check,
    experimental,
    frozen_copy,
    load,
    lora_shape,
    prepare,
    processes,
    reached,
    run_around,
    train_watched,
    trainer_arguments,
    watched,
)
from rm.fused import fuse
from rm.lora import attach_lora
from rm.train import CHECKPOINTS
from rubric_data.errors import UserError


def run_ppo(config: PolicyConfig) -> dict[str, Any]:
    """Train the policy, evaluate it on the test prompts before and after, write everything into ``config.output``.

    Returns what result.json holds: gold and proxy reward before, after and their gain, each as
    ``{value, low, high}``, finished share and response length before and after, final KL, the alarm if there was one,
    steps and seconds.
    Raises UserError on bad input, before anything is written.
    """
    check_ppo(config)
    cast = load(config)
    adapter = RubricRewardAdapter(
        cast.payer, cast.tokenizer, cast.training, cast.rewards, mask_unfinished=config.mask_unfinished
    )
    critic = build_critic(config.critic_from, config.critic_layers, cast.model, cast.tokenizer, cast.scorer)
    folder = begin(config)
    return run_around(config, cast, folder, lambda: train(config, folder, cast, adapter, critic))


def check_ppo(config: PolicyConfig) -> None:
    """Raise UserError on values that would fail later, and if the installed TRL has no PPO."""
    require_trl()
    check(config, ("ppo_epochs", "critic_layers"))
    if config.mask_unfinished and config.missing_eos_penalty is not None:
        raise UserError("missing_eos_penalty: mask_unfinished leaves nothing to take it from; set only one of the two")


def require_trl() -> ModuleType:
    """The module that holds TRL's PPO. Raises UserError if the installed TRL has none."""
    return experimental("ppo", "trl.experimental.ppo")


def train(
    config: PolicyConfig, folder: Path, cast: Cast, adapter: RubricRewardAdapter, critic: FrozenCritic
) -> tuple[Policy, list[Row]]:
    """PPO on the training prompts; returns the policy with what it has learnt and the rows of metrics.jsonl.

    Goes on from the last whole checkpoint, if there is one. The first process has the log and the watch; the others
    return no rows.
    """
    prepare(config, cast)
    fuse(cast.model)
    policy, reference = learner(config, cast.model)
    checkpoint, rows = reached(folder)
    adapter.go_on(len(rows))
    go_on(cast.payer, config, folder, rows)
    trainer = build_trainer(config, folder, cast, policy, reference, adapter, critic, len(rows))
    log, watch = watched(config, cast, folder, trainer, policy, adapter.take_rollouts, describe, checkpoint, rows)
    trainer.add_callback(
        PpoCheckpoints(trainer, watch, folder / CHECKPOINTS, checkpoint, every=config.save_steps, steps=config.steps)
    )
    train_watched(trainer.train)
    return policy.eval(), log.rows


def learner(config: PolicyConfig, model: PreTrainedModel) -> tuple[Policy, nn.Module]:
    """The policy that learns, ``model`` itself or with an adapter, and the one it starts as."""
    if not config.lora_rank:
        return model, frozen_copy(model)
    policy = attach_lora(model, **lora_shape(config, model))
    return policy, WithoutAdapter(policy)


def build_trainer(
    config: PolicyConfig,
    folder: Path,
    cast: Cast,
    policy: Policy,
    reference: nn.Module,
    adapter: RubricRewardAdapter,
    critic: FrozenCritic,
    done: int,
) -> Any:
    """TRL's trainer for the updates after ``done``, with ``config`` in TRL's words."""
    ppo = require_trl()
    arguments = ppo.PPOConfig(
        output_dir=str(folder),
        total_episodes=max(config.steps - done, 0) * config.batch_size,
        local_rollout_forward_batch_size=config.batch_size,  # a smaller one would only generate more slowly
        num_ppo_epochs=config.ppo_epochs,
        response_length=config.response_length,
        stop_token="eos",
        missing_eos_penalty=config.missing_eos_penalty,
        kl_coef=config.kl_coef,
        lam=config.gae_lambda,
        num_sample_generations=0,
        save_strategy="no",
        report_to=config.report_to,
        **trainer_arguments(config, cast),
    )
    ids = [encode_prompt(cast.tokenizer, prompt.prompt) for prompt in cast.training]
    trainer = ppo.PPOTrainer(
        args=arguments,
        processing_class=cast.tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=adapter,
        value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": ids}),
    )
    # in place of TRL's own, which shuffles anew where a run goes on; and accelerate would step after every micro
    # batch of a loader's last batch
    trainer.dataloader = prompt_batches(config, cast.tokenizer, ids, done)
    return trainer


class WithoutAdapter(nn.Module):
    """The policy as it was: its LoRA adapter is off during a call. TRL's own way fails on several processes."""

    def __init__(self, policy: PeftModel) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, **inputs: Any) -> Any:
        """As the policy's."""
        with self.policy.disable_adapter():
            return self.policy(**inputs)


def prompt_batches(
    config: PolicyConfig, tokenizer: PreTrainedTokenizerBase, ids: Sequence[list[int]], done: int
) -> Iterator[Any]:
    """This process's share of the prompts of each update after ``done``: ids and mask (B, T), padded on the left.

    ``ids`` are those of all prompts, in the order of the run (`policy.prompts.prompt_order`).
    """
    order = prompt_order(len(ids), config.steps * config.batch_size, seed=config.seed)
    share = config.batch_size // processes().num_processes
    collate = DataCollatorWithPadding(tokenizer)
    for start in range(done * config.batch_size + processes().process_index * share, len(order), config.batch_size):
        yield collate([{"input_ids": ids[place]} for place in order[start : start + share]])


def describe(logs: dict[str, float], rollouts: Sequence[Rollout]) -> Row:
    """What PPO alone can tell of an update; ``logs`` is TRL's own."""
    return {
        "kl": logs["objective/kl"],
        "entropy": logs["objective/entropy"],
        "clip_share": logs["policy/clipfrac_avg"],
        "value_loss": logs["loss/value_avg"],
    }
