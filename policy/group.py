"""RL within groups: TRL's GRPO and RLOO train a policy with LoRA on the reward model's reward, watched by the judge.

Owns the trainers, their settings and what they alone log; the reward is `policy.reward`, everything around the trainer
`policy.stage`. Beside that the run folder has checkpoints/, from which an interrupted run goes on.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import PrinterCallback

from policy.adapter import Rollout
from policy.config import GroupConfig, GrpoConfig, RlooConfig
from policy.prompts import RubricPrompt, require_pad
from policy.reward import RubricReward, RubricScoring, Told, completion_text, reward_dataset
from policy.stage import (
    METRICS,
    Cast,
    Row,
    StepLog,
    check,
    gold_watch,
    load,
    lora_shape,
    number_of,
    prepare,
    run_around,
    train_watched,
    trainer_arguments,
)
from policy.step_rewards import StepRewards
from rm.fused import fuse
from rm.lora import compute_in_backbone_dtype, lora_config
from rm.scorer import Scored
from rm.train import CHECKPOINTS, last_checkpoint
from rubric_data.errors import UserError
from rubric_data.files import start_run, write_text
from rubric_data.records import Rubric

_FREE = ("steps", "save_steps", "report_to")  # what a resumed run may change


def run_grpo(config: GrpoConfig) -> dict[str, Any]:
    """As `policy.ppo.run_ppo`, by GRPO. Raises UserError on bad input, before anything is written."""
    return _run(config)


def run_rloo(config: RlooConfig) -> dict[str, Any]:
    """As `policy.ppo.run_ppo`, by RLOO. Raises UserError on bad input, before anything is written."""
    return _run(config)


def _run(config: GrpoConfig | RlooConfig) -> dict[str, Any]:
    check(config, ("save_steps",))
    check_groups(config)
    cast = load(config)
    require_pad(cast.tokenizer)
    reward = RecordedReward(cast.scorer, cast.rewards, cast.training, cast.tokenizer.eos_token_id)
    reward.check(prompt.rubric.model_dump_json() for prompt in cast.training)
    folder = start_run(config.output, asdict(config), resume=config.resume, free=_FREE)
    return run_around(config, cast, folder, lambda: train(config, folder, cast, reward))


def check_groups(config: GroupConfig) -> None:
    """Raise UserError where an update would not hold whole groups."""
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
        rewards = super().__call__(prompts, completions, rubric, **columns)
        rows = zip(self._asked, completions, columns["completion_ids"], self._scored, rewards, strict=True)
        self._rollouts += [
            Rollout.of(
                prompt,
                completion_text(completion),
                ids,
                scored,
                math.nan if reward is None else reward,
                self._end_token,
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
    config: GrpoConfig | RlooConfig, folder: Path, cast: Cast, reward: RecordedReward
) -> tuple[PeftModel, list[Row]]:
    """Train on the training prompts; returns the policy with its LoRA adapter and the rows of metrics.jsonl.

    Goes on from the last whole checkpoint, if there is one: `start_run` lets nobody else's be there.
    """
    prepare(config, cast)
    fuse(cast.model)
    checkpoint = last_checkpoint(folder / CHECKPOINTS)
    rows = rows_until(checkpoint, folder / METRICS)
    reward.step = len(rows)
    trainer = build_trainer(config, folder / CHECKPOINTS, cast, reward)
    watch = gold_watch(config, cast, trainer.model, folder, done=len(rows))
    if checkpoint is not None:
        watch.load(checkpoint)
    log = StepLog(config, folder / METRICS, watch, reward.take_rollouts, describe, rows)
    trainer.add_callback(log)
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
            output_dir=str(folder),
            max_steps=config.steps,
            shuffle_dataset=False,  # it is in order already
            num_generations=config.group_size,
            max_completion_length=config.response_length,
            beta=config.kl_coef,
            save_steps=config.save_steps,
            save_total_limit=1,
            report_to=config.report_to,
            **trainer_arguments(config, cast),
            **own,
        ),
        processing_class=cast.tokenizer,
        train_dataset=reward_dataset(
            cast.training,
            prompt_order(len(cast.training), config.steps * config.batch_size // config.group_size, seed=config.seed),
        ),
        # the adapter comes from here, so that the reference is the policy without it, and no second one is made
        peft_config=lora_config(cast.model, **lora_shape(config, cast.model)),
    )
    compute_in_backbone_dtype(trainer.model)
    trainer.remove_callback(PrinterCallback)
    return trainer


def prompt_order(prompts: int, count: int, *, seed: int) -> list[int]:
    """``count`` places of ``prompts``, which all come once, shuffled, before any comes again.

    A longer order begins with the shorter one. It is the whole run's, because TRL's own shuffling begins anew where a
    run goes on in a later pass over the prompts.
    """
    chance = np.random.default_rng(seed)
    passes = [chance.permutation(prompts) for _ in range(math.ceil(count / prompts))]
    return [int(place) for place in np.concatenate(passes)[:count]]


def describe(logs: dict[str, float], rollouts: Sequence[Rollout]) -> Row:
    """What GRPO and RLOO alone can tell of an update; ``logs`` is TRL's own, whose KL and entropy are per token."""
    tokens = sum(rollout.tokens for rollout in rollouts) / len(rollouts)
    own: Row = {
        "kl": number_of(logs.get("kl"), tokens),
        "entropy": number_of(logs.get("entropy"), tokens),
        "same_reward_share": number_of(logs.get("frac_reward_zero_std")),
        "grad_norm": number_of(logs.get("grad_norm")),
    }
    return own | {name: number_of(value) for name, value in sorted(logs.items()) if name.startswith("criteria/")}


def rows_until(checkpoint: Path | None, path: Path) -> list[Row]:
    """The rows of ``path`` up to ``checkpoint``; the file loses those after it, which will be made again."""
    step = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    lines = path.read_text(encoding="utf-8").splitlines()[:step] if path.exists() else []
    write_text(path, "".join(f"{line}\n" for line in lines))
    return [json.loads(line) for line in lines]
