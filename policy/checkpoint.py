"""What a policy has learnt, on disk: as a run ends, and at best gold reward. Judges nothing.

That is its LoRA adapter, or, of a policy without one, the whole model.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rm.backbone import load_causal_lm


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``folder``, which takes its place only if the block succeeds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
        os.rename(temporary, folder)
        folder.chmod(folder.parent.stat().st_mode)  # mkdtemp's folder is closed to others
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


Policy: TypeAlias = PeftModel | PreTrainedModel


def save_adapter(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write LoRA weights, or the model, as safetensors, and the tokenizer into ``folder``, which appears when complete.

    ``weights`` by the policy's own names; None means those it has now.
    """
    with whole_folder(folder) as temporary:
        policy.save_pretrained(str(temporary), state_dict=weights)
        tokenizer.save_pretrained(temporary)


class BestAdapter:
    """The adapter, or the model, that wrote the best rollouts so far, in ``folder``/step-N.

    An update's rollouts are judged after its optimiser steps, so the weights that wrote them are remembered before.
    What an interrupted run left in ``folder`` goes; `take` brings back what was saved with a checkpoint.
    """

    def __init__(self, policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        self._policy, self._tokenizer, self._folder = policy, tokenizer, folder
        self._kept: Path | None = None
        shutil.rmtree(folder, ignore_errors=True)
        self.remember()

    def remember(self) -> None:
        """Hold the policy's weights of now: those that the next update's rollouts are written with."""
        trained = (pair for pair in self._policy.named_parameters() if pair[1].requires_grad)
        self._weights = {name: weight.detach().cpu().clone() for name, weight in trained}

    def keep(self, step: int) -> None:
        """Write what is remembered as the best, in the place of the one before, which goes last."""
        self._folder.mkdir(exist_ok=True)
        before, self._kept = self._kept, self._folder / f"step-{step}"
        save_adapter(self._policy, self._tokenizer, self._kept, self._weights)
        if before is not None:
            shutil.rmtree(before)

    def save(self, folder: Path) -> None:
        """Copy what is kept into ``folder``, in the place of what is there."""
        shutil.rmtree(folder, ignore_errors=True)
        if self._kept is not None:
            shutil.copytree(self._kept, folder / self._kept.name)

    def take(self, folder: Path) -> None:
        """Keep what `save` left in ``folder``."""
        for saved in folder.glob("step-*"):
            self._kept = self._folder / saved.name
            shutil.copytree(saved, self._kept)

    def restore(self) -> None:
        """Give the policy the best weights back."""
        if self._kept is None:
            raise ValueError("BestAdapter: nothing was kept yet")
        if isinstance(self._policy, PeftModel):
            set_peft_model_state_dict(self._policy, load_peft_weights(str(self._kept)))
        else:
            self._policy.load_state_dict(load_causal_lm(str(self._kept), dtype=self._policy.dtype).state_dict())
