"""TRL's trainer of online DPO, adapted to rewards that tie or are missing, and to our log.

Owns what is adapted, and nothing of the loss: TRL's trainer samples two rollouts a prompt, prefers the better paid, and
takes the step. It offers no hooks for this, so three of its methods are extended; tests/policy/test_online_dpo.py holds
each against the installed TRL. What is trained on what is `policy.online_dpo`.
"""

import math
from typing import Any

import torch
from accelerate.utils import set_seed
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from rubric_data.errors import UserError

__all__ = ["OnlineDPOConfig", "PairTrainer"]


class PairTrainer(OnlineDPOTrainer):
    """`OnlineDPOTrainer` with one reward function, whose pairs teach only what their rewards tell.

    What differs from TRL 1.12:

    - A pair that is paid the same, or of which one rollout has no reward, is left out of the loss. TRL takes no reward
      for 0, and of a tie prefers whichever it drew first. With ``mask_unfinished`` a rollout that never ends has none.
    - Log-probabilities count up to the end token, in the logged KL and entropy as in the loss. TRL logs the sum over
      the padding, too.
    - Log-probabilities are float32, also of a policy in bfloat16, whose sums over a response would lose whole nats.
    - The gradients of an update's micro batches are averaged. TRL adds them up, so that clipping depends on their size.
    - The reward function gets completions' ids without padding, and ``log_metric``, as from TRL's group trainers.
    - Processes draw different samples from one seed.

    Beside TRL's, it logs ``pairs/margin``, the mean difference of the two rewards, 0 where one is missing, and
    ``pairs/same_reward``, the share of pairs that taught nothing.

    Raises UserError on several reward functions, and on vLLM, whose rollouts come another way.
    """

    def __init__(self, *, mask_unfinished: bool = False, **options: Any) -> None:
        super().__init__(**options)
        if len(self.reward_funcs) != 1 or self.args.use_vllm:
            raise UserError(
                "online DPO: takes one reward function, and samples without vLLM; change reward_funcs or args"
            )
        self._mask_unfinished = mask_unfinished
        self.accelerator.gradient_accumulation_steps = self.args.gradient_accumulation_steps
        set_seed(self.args.seed, device_specific=True)
        self._noted: dict[str, list[float]] = {}

    def _generate(self, model: Any, prompts: Any, images: Any = None) -> Any:
        generated = super()._generate(model, prompts, images)
        self._mask_BT = generated[-1]  # of completions: 1 up to the end token; the loss will read it
        return generated

    def _forward(
        self,
        model: Any,
        prompt_ids: Any,
        prompt_mask: Any,
        completion_ids: Any,
        completion_mask: torch.Tensor,
        vision_inputs: Any = None,
    ) -> torch.Tensor:
        def in_float32(*tokens: Any, **options: Any) -> Any:
            output = model(*tokens, **options)
            output.logits = output.logits.float()
            return output

        sides = prompt_ids, prompt_mask, completion_ids, completion_mask
        return super()._forward(in_float32, *sides, vision_inputs).masked_fill(completion_mask == 0, 0.0)

    def _calculate_rewards_from_functions(
        self, prompts: Any, completions: Any, completion_ids_list: list[list[int]], **columns: Any
    ) -> torch.Tensor:
        """(B,) rewards, those of a pair B / 2 apart; takes the pairs that tell nothing out of the mask."""
        lengths = self._mask_BT.sum(1).tolist()
        (reward,) = self.reward_funcs
        rewards = reward(
            prompts=prompts,
            completions=completions,
            completion_ids=[ids[:length] for ids, length in zip(completion_ids_list, lengths, strict=True)],
            trainer_state=self.state,
            log_metric=self._note,
            **columns,
        )
        known = [math.nan if one is None else one for one in rewards]
        rewards_B = torch.tensor(known, dtype=torch.float32, device=self._mask_BT.device)
        if self._mask_unfinished:
            end = self.processing_class.eos_token_id
            rewards_B[[end not in ids for ids in completion_ids_list]] = math.nan
        first_P, second_P = rewards_B.chunk(2)
        margin_P = (first_P - second_P).abs().nan_to_num()
        self._mask_BT[(margin_P == 0).repeat(2)] = 0  # both log-probabilities are now 0, and have no gradient
        self._note("pairs/margin", self._mean(margin_P))
        self._note("pairs/same_reward", self._mean((margin_P == 0).float()))
        return rewards_B.nan_to_num(nan=float(rewards_B.nanmean().nan_to_num()))  # TRL's own statistics alone see it

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log of an update, and what was noted since the last."""
        noted, self._noted = self._noted, {}
        super().log({**logs, **{name: sum(values) / len(values) for name, values in noted.items()}}, start_time)

    def _note(self, name: str, value: float) -> None:
        self._noted.setdefault(name, []).append(value)

    def _mean(self, values: torch.Tensor) -> float:
        """Over all processes."""
        return float(self.accelerator.gather(values).mean())
