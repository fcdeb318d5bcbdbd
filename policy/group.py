"""RL within groups: TRL's GRPO and RLOO train a policy on the reward model's reward, watched by the judge.

Owns the trainers, their settings and what they alone log, and how a trainer with ``reward_funcs`` is run in the frame
of `policy.stage`; the reward is `policy.reward`.

Several processes: `torchrun --nproc_per_node 2 -m policy.cli grpo ...`; see `policy.stage`.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from policy.adapter import Rollout
from policy.checkpoint import Policy
from policy.config import GroupConfig, GrpoConfig, RlConfig, RlooConfig
from policy.fallback import go_on
from policy.prompts import RubricPrompt, prompt_order, require_pad
from policy.reward import RubricReward, RubricScoring, Told, completion_text, reward_dataset
from policy.stage import (
    Cast,
    Describe,
    Row,
    begin,
    check,
    frozen_copy,
    load,
    lora_shape,
    number_of,
    prepare,
    reached,
    run_around,
    train_watched,
    trainer_arguments,
    watched,
)
from policy.step_rewards import StepRewards
from rm.fused import fuse
from rm.lora import compute_in_backbone_dtype, lora_config
from rm.scorer import Scored
from rm.train import CHECKPOINTS
from rubric_data.errors import UserError
from rubric_data.records import Rubric

AnyConfig = TypeVar("AnyConfig", bound=RlConfig)


def run_grpo(config: GrpoConfig) -> dict[str, Any]:
    """As `policy.ppo.run_ppo`, by GRPO. Raises UserError on bad input, before anything is written."""
    return _run(config)


def run_rloo(config: RlooConfig) -> dict[str, Any]:
    """As `policy.ppo.run_ppo`, by RLOO. Raises UserError on bad input, before anything is written."""
    return _run(config)


def _run(config: GrpoConfig | RlooConfig) -> dict[str, Any]:
    check_groups(config)
    return run_by(config, build_trainer, partial(describe, masked=config.mask_unfinished))


def run_by(
    config: AnyConfig, build: Callable[[AnyConfig, Path, Cast, "RecordedReward"], Any], tell: Describe
) -> dict[str, Any]:
    """A whole run of the trainer that ``build`` makes, once ``config`` was checked; returns what result.json holds.

    The folder that ``build`` is given is for checkpoints; ``tell`` is `StepLog`'s describe.
    """
    cast = load(config)
    require_pad(cast.tokenizer)
    reward = RecordedReward(cast.payer, cast.rewards, cast.training, cast.tokenizer.eos_token_id)
    reward.check(prompt.rubric.model_dump_json() for prompt in cast.training)
    folder = begin(config)
    return run_around(config, cast, folder, lambda: train(config, folder, cast, reward, build, tell))


def check_groups(config: GroupConfig) -> None:
    """Raise UserError on values that would fail later, and where an update would not hold whole groups."""
    check(config)
    if config.group_size < 2:
        raise UserError(f"group_size: must be at least 2, got {config.group_size}; a group is what rewards compare")
    if config.batch_size % config.group_size:
        raise UserError(f"batch_size: {config.batch_size} is no multiple of group_size {config.group_size}; change one")


class RecordedReward(RubricReward):
    """Pays by ``rewards``, and keeps the rollouts that it was asked about until they are taken.

    Rows tell their prompt by the column ``place``, its index in ``prompts``. ``step`` counts updates from 0; one ends
    with `take_rollouts`.
    """

    def __init__(
        self, scorer: RubricScoring, rewards: StepRewards, prompts: Sequence[RubricPrompt], end_token: int
    ) -> None:
        super().__init__(scorer)
        self.step = 0
        self._rewards, self._prompts, self._end_token = rewards, prompts, end_token
        self._asked: list[RubricPrompt] = []
        self._scored: list[Scored] = []
        self._rollouts: list[Rollout] = []

    def __call__(
        self,
        prompts: Sequence[Told],
        completions: Sequence[Told],
        rubric: Sequence[str | Mapping[str, Any] | None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """As `RubricReward`, of rows that all have a rubric."""
        self._asked = [self._prompts[index] for index in columns["place"]]
        begun = time.perf_counter()
        rewards = super().__call__(prompts, completions, rubric, **columns)
        seconds = (time.perf_counter() - begun) / len(rewards)
        rows = zip(self._asked, completions, columns["completion_ids"], self._scored, rewards, strict=True)
        self._rollouts += [
            Rollout.of(
                prompt,
                completion_text(completion),
                ids,
                scored,
                math.nan if reward is None else reward,
                self._end_token,
                seconds,
            )
            for prompt, completion, ids, scored, reward in rows
        ]
        return rewards

    def _pay(self, rubrics: Sequence[Rubric], scored: Sequence[Scored]) -> list[float]:
        self._scored = list(scored)
        return self._rewards(rubrics, scored, [prompt.prompt_id for prompt in self._asked], self.step)

    def take_rollouts(self) -> list[Rollout]:
        """All rows scored since the last call, in TRL's order: those of one update."""
        self.step += 1
        taken, self._rollouts = self._rollouts, []
        return taken


def train(
    config: AnyConfig,
    folder: Path,
    cast: Cast,
    reward: RecordedReward,
    build: Callable[[AnyConfig, Path, Cast, RecordedReward], Any],
    tell: Describe,
) -> tuple[Policy, list[Row]]:
    """Train on the training prompts; returns the policy with what it has learnt and the rows of metrics.jsonl.

    Goes on from the last whole checkpoint, if there is one. The first process has the log and the watch; the others
    return no rows.
    """
    prepare(config, cast)
    fuse(cast.model)
    checkpoint, rows = reached(folder)
    reward.step = len(rows)
    go_on(cast.payer, config, folder, rows)
    trainer = build(config, folder / CHECKPOINTS, cast, reward)
    if config.lora_rank:
        compute_in_backbone_dtype(trainer.model)
    log, _ = watched(config, cast, folder, trainer, trainer.model, reward.take_rollouts, tell, checkpoint, rows)
    train_watched(lambda: trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint)))
    return trainer.model.eval(), log.rows


def build_trainer(config: GrpoConfig | RlooConfig, folder: Path, cast: Cast, reward: RecordedReward) -> Any:
    """TRL's trainer with ``config`` in TRL's words; checkpoints go into ``folder``."""
    import trl

    kind, arguments, own = (
        (trl.GRPOTrainer, trl.GRPOConfig, {"loss_type": config.loss, "scale_rewards": config.scale_rewards})
        if isinstance(config, GrpoConfig)
        else (trl.RLOOTrainer, trl.RLOOConfig, {"normalize_advantages": config.normalise})
    )
    trainer = kind(
        model=cast.model,
        reward_funcs=[reward],
        args=arguments(
            shuffle_dataset=False,  # it is in order already
            num_generations=config.group_size,
            max_completion_length=config.response_length,
            beta=config.kl_coef,
            mask_truncated_completions=config.mask_unfinished,
            **trainer_arguments(config, cast),
            **run_settings(config, folder),
            **own,
        ),
        processing_class=cast.tokenizer,
        train_dataset=reward_dataset(
            cast.training,
            prompt_order(len(cast.training), config.steps * config.batch_size // config.group_size, seed=config.seed),
        ),
        # the adapter comes from here, so that the reference is the policy without it, and no second one is made
        peft_config=lora_config(cast.model, **lora_shape(config, cast.model)) if config.lora_rank else None,
    )
    if trainer.ref_model is not None:  # which TRL has read by its name, whatever the policy is by now
        trainer.ref_model = frozen_copy(cast.model)
    return trainer


def run_settings(config: RlConfig, folder: Path) -> dict[str, Any]:
    """What a trainer is told of the run's length, its checkpoints and its monitors, in TRL's words."""
    return {
        "output_dir": str(folder),
        "max_steps": config.steps,
        "save_steps": config.save_steps,
        "save_total_limit": 1,
        "report_to": config.report_to,
    }


def describe(logs: dict[str, float], rollouts: Sequence[Rollout], *, masked: bool) -> Row:
    """What GRPO and RLOO alone can tell of an update; ``logs`` is TRL's own, whose KL and entropy are per token.

    Where unfinished rollouts are ``masked`` TRL's means leave them out: of an update with such there is no KL.
    """
    tokens = sum(rollout.tokens for rollout in rollouts) / len(rollouts)
    told = {} if masked and not all(rollout.finished for rollout in rollouts) else logs
    return {
        "kl": number_of(told.get("kl"), tokens),
        "entropy": number_of(told.get("entropy"), tokens),
        "same_reward_share": number_of(logs.get("frac_reward_zero_std")),
        "grad_norm": number_of(logs.get("grad_norm")),
    }
