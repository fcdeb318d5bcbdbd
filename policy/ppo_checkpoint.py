"""Checkpoints of TRL's PPO, whose own loop begins at its first update whatever was done before.

Owns what a checkpoint holds of the trainer: trained weights (policy and value head), optimiser, scheduler, random
state of each process, count of updates; `policy.watching` adds what the judge has seen. The order of prompts needs no
saving (`policy.ppo.prompt_batches`).
"""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl

from policy.checkpoint import whole_folder
from policy.stage import processes, step_of
from policy.watching import GoldWatch
from rubric_data.errors import UserError

_WEIGHTS, _REST = "trained.safetensors", "training.pt"
_STATE = "trainer_state.json"  # the name by which `rm.train.last_checkpoint` knows a whole one


class PpoCheckpoints(TrainerCallback):
    """Writes ``folder``/checkpoint-N every ``every`` updates and after the last of ``steps``; the newest is kept.

    ``trainer`` goes on from ``checkpoint``, if there is one, by a loop of the updates that are left. Every process has
    one of these; the first, which has the ``watch``, writes. Raises UserError if ``checkpoint`` is of another number of
    processes.
    """

    def __init__(
        self, trainer: Any, watch: GoldWatch | None, folder: Path, checkpoint: Path | None, *, every: int, steps: int
    ) -> None:
        self._trainer, self._watch, self._folder = trainer, watch, folder
        self._every, self._steps, self._done = every, steps, step_of(checkpoint)
        self._random: dict[str, Any] | None = None
        if checkpoint is not None:
            self._load(checkpoint)

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:  # of TRL's own kinds
        state.global_step, state.max_steps = self._done, self._steps  # what the loop has just set to those of its own
        state.episode = self._done * args.batch_size
        if self._random is not None:
            _set_random_state(self._random)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self._every == 0 or state.global_step == self._steps:
            random_states = gather_object([_random_state()])
            if self._watch is not None:
                self._save(state, random_states, self._watch)

    def _save(self, state: Any, random_states: list[dict[str, Any]], watch: GoldWatch) -> None:
        trainer, folder = self._trainer, self._folder / f"checkpoint-{state.global_step}"
        with whole_folder(folder) as temporary:
            weights = {name: weight.detach().contiguous() for name, weight in self._trained().items()}
            save_file(weights, temporary / _WEIGHTS)
            rest = {"optimiser": trainer.optimizer.state_dict(), "scheduler": trainer.lr_scheduler.state_dict()}
            torch.save({**rest, "random": random_states}, temporary / _REST)
            watch.save(temporary)
            state.save_to_json(str(temporary / _STATE))
        for other in {*self._folder.glob("checkpoint-*"), *self._folder.glob(".checkpoint-*")} - {folder}:
            shutil.rmtree(other)

    def _load(self, checkpoint: Path) -> None:
        rest = torch.load(checkpoint / _REST, map_location="cpu", weights_only=True)
        states, count = rest["random"], processes().num_processes
        if len(states) != count:
            raise UserError(f"{checkpoint}: was written by {len(states)} processes, and now {count} run; start as many")
        weights, trained = load_file(checkpoint / _WEIGHTS), self._trained()
        with torch.no_grad():
            for name, weight in trained.items():
                weight.copy_(weights[name])
        self._trainer.optimizer.load_state_dict(rest["optimiser"])
        self._trainer.lr_scheduler.load_state_dict(rest["scheduler"])
        self._random = states[processes().process_index]

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        """What learns, of policy and value model, by name."""
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _random_state() -> dict[str, Any]:
    """Where every generator stands that training draws from, of types that `torch.load` trusts."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
