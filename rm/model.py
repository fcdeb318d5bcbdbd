"""The rubric-conditioned reward model: a decoder read along a rubric tree, one linear verdict head, a scale of levels.

Owns the weights: building, LoRA, saving, loading, merging. Text belongs to `rm.encoding`, probabilities to
`rm.calibration`, and everything a caller wants from both to `rm.scorer`.
"""

import json
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedTokenizerBase

from rm import levels, template
from rm.attention import NAME, check_backend
from rm.backbone import as_dtype, load_causal_lm, load_tokenizer
from rm.fused import fuse
from rm.layout import TreeLayout
from rm.lora import attach_lora, compute_in_backbone_dtype, merged
from rm.prefix_cache import Reading
from rubric_data.errors import UserError
from rubric_data.files import atomic_path, write_json

_DESCRIPTION = "rubric_rm.json"  # what a model folder says about itself
_HEAD = "head.safetensors"
_SPACING = "level_spacing"  # stands in the head's file once it has been trained


class RubricRewardModel(nn.Module):
    """One logit per (response, criterion) of a packed batch of rubric trees, in one forward pass.

    The head starts as the language model's own W[" Yes"] - W[" No"], so an untrained model is a zero-shot judge.
    """

    accepts_loss_kwargs = True  # the Trainer then hands us the global verdict count instead of averaging micro-batches

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Linear,
        base: str,
        max_length: int,
        attention: str = "auto",
        rubric_blind: bool = False,
    ) -> None:
        super().__init__()
        check_backend(attention)
        self.attention = attention  # backend of tree attention, see `rm.attention`; auto asks the device it is on
        self.backbone: Any = backbone  # a decoder without language-model head, or a PeftModel around one
        self.head = head
        self.level_spacing = nn.Parameter(torch.zeros(levels.CELLS), requires_grad=False)  # of `rm.levels`
        self.base = base  # where the backbone's pretrained weights come from
        self.max_length = max_length  # tokens on one path, prompt + response + criterion
        self.rubric_blind = rubric_blind  # whether it is never to read a criterion; its trees are to be encoded so

    @classmethod
    def from_language_model(
        cls,
        base: str,
        *,
        max_length: int = 2048,
        dtype: str = "auto",
        attention: str = "auto",
        rubric_blind: bool = False,
    ) -> Self:
        """Start from the causal language model ``base`` (folder, hub id or 'smollm2').

        Raises UserError if it cannot be loaded or if ``max_length`` exceeds its window.
        """
        tokenizer = load_tokenizer(base)
        check_backend(attention)
        language_model = load_causal_lm(base, dtype=as_dtype(dtype), attention=NAME)
        window = getattr(language_model.config, "max_position_embeddings", None)
        if window is not None and max_length > window:
            raise UserError(f"max_length: {max_length} exceeds the {window}-token window of {base!r}; lower it")
        rows = language_model.get_output_embeddings().weight.detach().float()
        yes, no = (_first_token(tokenizer, word) for word in (template.YES, template.NO))
        head = nn.Linear(rows.shape[1], 1)
        with torch.no_grad():
            head.weight.copy_((rows[yes] - rows[no])[None])
            head.bias.zero_()
        fuse(language_model.base_model)
        return cls(language_model.base_model, head, base, max_length, attention, rubric_blind)

    @property
    def config(self):
        """The backbone's transformers configuration."""
        return self.backbone.config

    def add_lora(self, rank: int, alpha: int, top_layers: int | None = None) -> None:
        """Freeze the backbone and put trainable float32 adapters of ``rank`` on every linear map of its layers.

        ``top_layers``: only of so many last layers, which spares the backward pass the ones below; None means all.
        """
        self.backbone = attach_lora(self.backbone, self.backbone.layers, rank=rank, alpha=alpha, top_layers=top_layers)

    def learn_levels(self) -> None:
        """Let training space the levels of graded criteria; untrained they are equally far apart."""
        self.level_spacing.requires_grad_(True)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        layout: TreeLayout,
        reading: Reading | None = None,
        levels_N: Tensor | None = None,
    ) -> Tensor:
        """Verdict logits (N,), float32, in the depth-first order of the packed trees; of their steps (M,) if asked.

        ``levels_N``: how many levels the criterion of each verdict has, 2 for yes and no. The answer is then the logit
        of every step, "is it level j or better?" (`rm.levels`), which for yes and no is the verdict's own. The rest is
        as in `features`.
        """
        logits_N = self.head(self.features(input_ids, position_ids, layout, reading)).squeeze(-1)
        return logits_N if levels_N is None else self.step_logits(logits_N, levels_N)

    def features(
        self, input_ids: Tensor, position_ids: Tensor, layout: TreeLayout, reading: Reading | None = None
    ) -> Tensor:
        """What the head reads, (N, D) float32: the last hidden state at the end of each criterion.

        ``input_ids`` and ``position_ids`` (1, T) and ``layout`` come from `rm.layout.pack`. With a ``reading``, keys
        and values of prompts and responses are kept, or recalled in place of being computed (`rm.prefix_cache`).
        """
        layout = layout.to(input_ids.device)
        answers = layout.answers
        if reading is not None and reading.fresh is not None:
            input_ids, position_ids = input_ids[:, reading.fresh], position_ids[:, reading.fresh]
            answers = torch.searchsorted(reading.fresh, answers)
        hidden_1TD = self.backbone(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            tree_layout=layout,
            tree_backend=self.attention,
            tree_reading=reading,
        ).last_hidden_state
        return hidden_1TD[0, answers].float()

    def step_logits(self, logits_N: Tensor, levels_N: Tensor) -> Tensor:
        """The verdicts' logits less the thresholds of their steps, (M,)."""
        cells_MC = np.concatenate([levels.cells(count) for count in levels_N.tolist()])
        slopes_C = levels.SLOPE * self.level_spacing.exp()
        thresholds_M = torch.from_numpy(cells_MC).to(logits_N) @ slopes_C
        return logits_N.repeat_interleave(levels_N - 1) - thresholds_M

    def merge(self) -> None:
        """Fold the LoRA weights into the backbone; scores change only by rounding to the backbone's dtype."""
        if isinstance(self.backbone, PeftModel):
            self.backbone = merged(self.backbone)

    def save(self, folder: str | Path) -> None:
        """Write the model into ``folder``: LoRA or full weights, head, description; safetensors only."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.save_pretrained(folder / "backbone", safe_serialization=True)
        with atomic_path(folder / _HEAD) as path:
            spacing = {_SPACING: self.level_spacing.detach()} if self.level_spacing.any() else {}
            tensors = self.head.state_dict() | spacing
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        description = {
            "base": self.base,
            "max_length": self.max_length,
            "template": template.template_hash(rubric_blind=self.rubric_blind),
            "rubric_blind": self.rubric_blind,
            "adapter": isinstance(self.backbone, PeftModel),
        }
        write_json(folder / _DESCRIPTION, description)  # last: its presence says the folder is whole

    def load_weights(self, folder: str | Path) -> None:
        """Take adapter (or full) and head weights from ``folder``, saved by a model of the same shape, to train on."""
        folder = Path(folder)
        self._load_head(folder)
        if isinstance(self.backbone, PeftModel):
            self.backbone.load_adapter(str(folder / "backbone"), "default", is_trainable=True)
        else:
            state = AutoModel.from_pretrained(folder / "backbone", dtype=self.backbone.dtype).state_dict()
            self.backbone.load_state_dict(state)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: str = "auto", attention: str = "auto", trainable: bool = False
    ) -> Self:
        """Load what `save` wrote, for inference or, ``trainable``, to train on.

        Raises UserError if ``folder`` is not a whole model.
        """
        folder = Path(folder)
        try:
            description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            raise UserError(
                f"{folder}: is no reward model (no {_DESCRIPTION}); give the model/ folder of a training run"
            ) from None
        blind = description.get("rubric_blind", False)  # no key: from before there were such models
        if description["template"] != template.template_hash(rubric_blind=blind):
            raise UserError(f"{folder}: was trained with another prompt template; retrain it with this version")
        max_length, base = description["max_length"], description["base"]
        if description["adapter"]:
            model = cls.from_language_model(
                base, max_length=max_length, dtype=dtype, attention=attention, rubric_blind=blind
            )
            model.backbone = PeftModel.from_pretrained(model.backbone, str(folder / "backbone"), is_trainable=trainable)
            compute_in_backbone_dtype(model.backbone)
        else:
            backbone = AutoModel.from_pretrained(folder / "backbone", dtype=as_dtype(dtype), attn_implementation=NAME)
            fuse(backbone)
            model = cls(backbone, nn.Linear(backbone.config.hidden_size, 1), base, max_length, attention, blind)
        model._load_head(folder)
        return model.eval()

    def _load_head(self, folder: Path) -> None:
        tensors = load_file(folder / _HEAD)
        spacing = tensors.pop(_SPACING, torch.zeros(levels.CELLS))
        self.head.load_state_dict(tensors)
        with torch.no_grad():
            self.level_spacing.copy_(spacing)


def _first_token(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    return tokenizer(word, add_special_tokens=False).input_ids[0]
