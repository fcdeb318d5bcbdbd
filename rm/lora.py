"""LoRA adapters for reward model and policy alike: where they sit, and how they compute."""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


class _LoraInBackboneDtype:
    """How peft's LoRA layers compute here: float32 weights, used in the dtype of the backbone's activations.

    peft would cast every token to float32 and back, and scale and add in passes of their own: the same result to
    rounding, at half the speed. peft calls ``forward`` in place of its own arithmetic (`LoraLayer.lora_variant`).
    """

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: object) -> Tensor:
        down_RD, up_DR = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        low = nn.functional.linear(x, (module.scaling[active_adapter] * down_RD).to(x.dtype))
        return torch.addmm(result.flatten(0, -2), low.flatten(0, -2), up_DR.to(x.dtype).T).view_as(result)


def linear_maps(model: nn.Module, layers: Any, top_layers: int | None = None) -> list[str]:
    """Names within ``model`` of every linear map of its ``layers``, or of the ``top_layers`` last ones."""
    first = 0 if top_layers is None else max(len(layers) - top_layers, 0)
    chosen = {module for layer in layers[first:] for module in layer.modules() if isinstance(module, nn.Linear)}
    return [name for name, module in model.named_modules() if module in chosen]


def lora_config(
    model: Any, layers: Any, *, rank: int, alpha: int, top_layers: int | None = None, task_type: str | None = None
) -> LoraConfig:
    """The adapters that `attach_lora` puts on ``model``, for who attaches them elsewhere."""
    targets = linear_maps(model, layers, top_layers)
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type=task_type)


def attach_lora(
    model: Any, layers: Any, *, rank: int, alpha: int, top_layers: int | None = None, task_type: str | None = None
) -> PeftModel:
    """Freeze ``model`` and put float32 adapters of ``rank`` on every linear map of its decoder ``layers``.

    ``top_layers``: only of so many last layers, which spares the backward pass the ones below; None means all.
    """
    shape = lora_config(model, layers, rank=rank, alpha=alpha, top_layers=top_layers, task_type=task_type)
    adapted = get_peft_model(model, shape)
    compute_in_backbone_dtype(adapted)
    return adapted


def compute_in_backbone_dtype(model: PeftModel) -> None:
    """Have the adapters of ``model`` compute in the dtype of its activations (peft's own way is slower)."""
    for layer in _lora_layers(model):
        layer.cast_input_dtype_enabled = False
        layer.lora_variant.update(dict.fromkeys(layer.lora_A, _LoraInBackboneDtype))


def merged(model: PeftModel) -> Any:
    """The model with its adapters folded into its weights; outputs change only by rounding to the weights' dtype."""
    for layer in _lora_layers(model):
        layer.lora_variant.clear()  # what is merged is plain LoRA
    return model.merge_and_unload()


def _lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]
