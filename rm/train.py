"""Distil verdicts into a reward model, on transformers' Trainer. Orders the steps; the arithmetic lives elsewhere.

Several processes: `torchrun --nproc_per_node 2 -m policy.cli train ...` (accelerate picks gloo or NCCL).
"""

import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import TrainOutput

from rm.attention import choose_backend
from rm.backbone import as_dtype, load_tokenizer
from rm.config import RedistilConfig, TailConfig, TrainConfig
from rm.data import (
    MASKED,
    TokenBudgetSampler,
    TrainingTree,
    budget_batches,
    build_trees,
    collate,
    collator,
    load_training,
)
from rm.encoding import Encoder
from rm.loss import distillation_loss, expected_levels, predicted_rewards, verdict_loss
from rm.metrics import accuracy, auroc, brier, concordance, value
from rm.model import RubricRewardModel
from rubric_data.builtin.drills import drills
from rubric_data.errors import UserError
from rubric_data.files import start_run, write_json
from rubric_data.split import SPLITS, of_split

MODEL_FOLDER = "model"
CHECKPOINTS = "checkpoints"
_TARGETS = ("labels", "counts", "weights", "veto", "response", "pairs", "pair_weights", "levels")


class DistillationTrainer(Trainer):
    """A Trainer that eats trees: batches by token budget, our loss, and checkpoints of adapters and head only."""

    optimizer: Any
    control: Any

    def __init__(
        self,
        config: TrainConfig | TailConfig | RedistilConfig,
        model: RubricRewardModel,
        args: TrainingArguments,
        *,
        tail_weight: float,
        train_dataset: list[TrainingTree],
        **kwargs: Any,
    ) -> None:
        self.config = config
        if any(count > 2 for tree in train_dataset for count in tree.levels):
            model.learn_levels()
        stop = EarlyStoppingCallback(config.patience)
        fixed = {"data_collator": collator(tail_weight), "callbacks": [stop], "train_dataset": train_dataset}
        super().__init__(model, args, **fixed, **kwargs)
        self.pop_callback(ProgressCallback)
        self.add_callback(_Progress)

    def run(self, *, resume: bool) -> TrainOutput:
        """Train, from the last whole checkpoint if ``resume``; the model has the best weights then."""
        checkpoint = last_checkpoint(Path(self.args.output_dir)) if resume else None
        return self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def sampler(self) -> TokenBudgetSampler:
        """What the batches are."""
        return TokenBudgetSampler(
            [tree.tree.length for tree in self.train_dataset],
            self.config.tokens_per_batch,
            self.args.seed,
            self.accelerator.num_processes,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Batches of packed trees, dealt out to the processes in turn."""
        loader = DataLoader(self.train_dataset, batch_sampler=self.sampler(), collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW, with a learning rate of its own for the verdict head."""
        if self.optimizer is None:
            head = list(self.model.head.parameters())
            spacing = [p for p in [self.model.level_spacing] if p.requires_grad]
            rest = [p for p in self.model.backbone.parameters() if p.requires_grad]
            groups = [
                {"params": rest, "lr": self.args.learning_rate},
                {"params": head, "lr": self.config.head_learning_rate},
            ] + [{"params": spacing, "lr": self.config.level_learning_rate}] * bool(spacing)
            self.optimizer = torch.optim.AdamW(groups, weight_decay=self.args.weight_decay, betas=(0.9, 0.98))
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of one micro-batch, as its share of the optimiser step's loss."""
        targets = {name: inputs.pop(name) for name in _TARGETS}
        logits = model(**inputs, levels_N=targets["levels"])
        if num_items_in_batch is None:
            num_items_in_batch = (targets["labels"] != MASKED).sum()
        loss = distillation_loss(
            logits, *targets.values(), pairwise_weight=self.config.pairwise_weight, verdicts=num_items_in_batch
        )
        loss = loss * self.accelerator.num_processes  # the processes' gradients are averaged, the count is global
        return (loss, {"logits": logits}) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Read the validation data; every process reads all of it, so all agree on when to stop."""
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.validate().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def validate(self) -> dict[str, float]:
        """The numbers of one validation, by name."""
        return evaluate_trees(self.model, self.eval_dataset, self.config.tokens_per_batch, self.args.device)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.accelerator.unwrap_model(self.model).save(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.accelerator.unwrap_model(self.model).load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class _Progress(ProgressCallback):
    """One bar with the last loss; a line for each validation instead of one for each step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or not logs:
            return
        if any(name.startswith("eval_") for name in logs):
            shown = "  ".join(f"{name[5:]} {logs[name]:.3f}" for name in logs if name.startswith("eval_"))
            self.training_bar.write(f"step {state.global_step:>4}  validation: {shown}")
        elif "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


@torch.no_grad()
def evaluate_trees(
    model: RubricRewardModel, trees: list[TrainingTree], tokens_per_batch: int, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Loss, accuracy, AUROC and Brier score of single verdicts, and pair accuracy of rewards within a prompt.

    The loss is a mean weighted by the verdicts' counts, as in training.
    """
    was_training = model.training
    model.eval()
    expected, labels, loss, counted, right, pairs = [], [], 0.0, 0.0, 0.0, 0.0
    for chosen in budget_batches([tree.tree.length for tree in trees], tokens_per_batch):
        batch = collate([trees[index] for index in chosen], tail_weight=1.0)
        placed = batch["input_ids"].to(device), batch["position_ids"].to(device), batch["layout"]
        levels = batch["levels"]
        out = model(*placed, levels_N=levels.to(device)).cpu()
        loss += verdict_loss(out, batch["labels"], batch["counts"], levels).item()
        counted += batch["counts"].sum().item()
        response = batch["response"]
        rewards = predicted_rewards(out, batch["weights"], batch["veto"], response, int(response[-1]) + 1, levels)
        better, worse = rewards[batch["pairs"]].unbind(-1)
        right += ((better > worse) + 0.5 * (better == worse)).sum().item()
        pairs += len(better)
        known = batch["labels"] != MASKED
        expected.append(expected_levels(out.double(), levels)[known].numpy())
        labels.append(batch["labels"][known].numpy())
    model.train(was_training)
    gold, probs = np.concatenate(labels), np.concatenate(expected)
    prompt = np.zeros(len(gold), int)  # one group: no intervals are wanted here
    metrics = {
        "loss": loss / counted,
        "accuracy": value(accuracy(gold, probs, prompt, 1)),
        "auroc": value(auroc(gold, probs, prompt, 1)),
        "concordance": value(concordance(gold, probs, prompt, 1)),
        "brier": value(brier(gold, probs, prompt, 1)),
        "pair_accuracy": right / pairs if pairs else math.nan,
    }
    return {name: number for name, number in metrics.items() if not math.isnan(number)}


def whole_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in ``folder`` that were written to their end, by step; a kill may leave a partial one behind."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    return {int(path.name.rpartition("-")[2]): path for path in whole}


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    whole = whole_checkpoints(folder)
    return whole[max(whole)] if whole else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return False
    return True


def training_arguments(
    config: TrainConfig | TailConfig | RedistilConfig, folder: Path, select_by: str
) -> TrainingArguments:
    """Our configuration in transformers' words; ``select_by`` names the validation number of the best checkpoint."""
    return TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_ratio,
        lr_scheduler_type="cosine",
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        gradient_accumulation_steps=config.gradient_accumulation,
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        save_steps=config.eval_steps,
        save_total_limit=config.keep_checkpoints,
        load_best_model_at_end=True,
        metric_for_best_model=select_by,
        greater_is_better=select_by not in ("loss", "brier"),
        logging_steps=config.logging_steps,
        report_to=config.report_to,
        seed=config.seed,
        max_grad_norm=1.0,
        remove_unused_columns=False,
        label_names=["labels"],
        accelerator_config={"even_batches": False},  # a batch is a list of trees; there is no batch size to even out
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
        average_tokens_across_devices=True,
        disable_tqdm=False,
    )


def build_model(config: TrainConfig) -> RubricRewardModel:
    """The untrained model of a configuration: a zero-shot judge, with LoRA if asked for."""
    model = RubricRewardModel.from_language_model(
        config.model,
        max_length=config.max_length,
        dtype=config.dtype,
        attention=config.attention,
        rubric_blind=config.rubric_blind,
    )
    if config.lora_rank:
        model.add_lora(config.lora_rank, config.lora_alpha, config.lora_layers)
    if config.gradient_checkpointing:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def run_train(config: TrainConfig) -> dict[str, Any]:
    """Train as ``config`` says; returns what train.json holds. Raises UserError on bad input."""
    if config.rubric_blind and config.drills:
        raise UserError(f"drills: {config.drills} are asked for, and rubric_blind hides them; train it with --drills 0")
    state = PartialState(cpu=not torch.cuda.is_available())
    folder = Path(config.output)
    set_seed(config.seed)
    choose_backend(config.attention, state.device, as_dtype(config.dtype, state.device))
    records, by_code = load_training(config.data, use_verifiers=config.use_verifiers)
    encoder = Encoder(load_tokenizer(config.model), config.max_length, config.rubric_blind)
    training, validation = (of_split(records, split) for split in SPLITS[:2])
    drilled = drills([(record.prompt, record.response) for record in training], config.drills, f"drills {config.seed}")
    grow = functools.partial(build_trees, responses_per_tree=config.responses_per_tree, seed=config.seed)
    train_trees = grow(training, encoder, drilled=drilled)
    eval_trees = grow(validation, encoder)[: config.eval_trees]
    model = build_model(config)
    if state.is_main_process:  # last of what bad input can stop
        start_run(folder, dataclasses.asdict(config), resume=config.resume)
    state.wait_for_everyone()
    trainer = DistillationTrainer(
        config,
        model,
        training_arguments(config, folder, config.select_by),
        tail_weight=config.tail_weight,
        train_dataset=train_trees,
        eval_dataset=eval_trees,
    )
    started = time.perf_counter()
    device = trainer.args.device
    before = evaluate_trees(trainer.model.to(device), eval_trees, config.tokens_per_batch, device)
    if config.select_by not in before:
        raise UserError(f"select_by: {config.select_by} is undefined on these validation responses; select by loss")
    result = trainer.run(resume=config.resume)
    after = evaluate_trees(trainer.model, eval_trees, config.tokens_per_batch, device)
    report = {
        "steps": result.global_step,
        "processes": trainer.accelerator.num_processes,
        "seconds": round(time.perf_counter() - started, 1),
        "by_code": by_code and dataclasses.asdict(by_code),
        "train_verdicts": sum(not math.isnan(value) for tree in train_trees for value in tree.values),
        "train_trees": len(train_trees),
        "tokens_per_epoch": sum(tree.tree.length for tree in train_trees),
        "tokens_cut": sum(tree.cut for tree in train_trees),
        "validation_before": before,
        "validation_after": after,
        "log": trainer.state.log_history,
    }
    if state.is_main_process:
        trainer.model.save(folder / MODEL_FOLDER)
        load_tokenizer(config.model).save_pretrained(folder / MODEL_FOLDER)
        write_json(folder / "train.json", report)
    state.wait_for_everyone()
    return report
