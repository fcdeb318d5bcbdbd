"""Train the peers an audit is read beside on the terms of a finished run of ours, and write what they score.

    python -m benchmarks.peers --peer bt      --run runs/train --output runs/peers/bt.jsonl
    python -m benchmarks.peers --peer any2jev --run runs/train --output runs/peers/any2jev.jsonl

bt: a Bradley-Terry scalar reward by TRL's RewardTrainer, on pairs of responses to one prompt whose rewards from the
judge differ. It knows no criteria, so its file holds rewards alone: "criteria" is null, and "reward" is any number.

any2jev: the nearest public peer (any2jev 0.1, extra `bench`), on the verdicts themselves: every criterion is one of
its yes/no questions about prompt and response, and soft verdicts are soft targets. Its file is one of `rubric-rm
score`, with the temperature that its own pipeline would fit, on validation verdicts.

The terms: data, backbone, window, adapters, learning rates, schedule and optimiser steps are those of --run, and a
peer reads as many tokens as that run did (padding not counted; the run's packed tokens count a shared prompt once).
Prompts and responses are cut as ours are. A tenth of those tokens, from the validation split, is read four times on
the way, and the weights that were best there are kept, as ours are. Facts of the training stand beside the scores, in
a .json of the same name. A finished peer is not trained again. The rubric-blind peer needs no program: `rubric-rm
train --rubric_blind true`.
"""

import argparse
import functools
import importlib.metadata
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from scipy.special import expit
from transformers import (
    AutoModelForSequenceClassification,
    TrainerCallback,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from benchmarks.record import circumstances
from rm import template
from rm.backbone import load_causal_lm, load_tokenizer, native_dtype, resolve_model
from rm.calibration import fit_curve
from rm.config import TrainConfig
from rm.data import budget_batches, load_training
from rm.encoding import Encoder
from rm.lora import attach_lora, linear_maps
from rm.memory import keep_memory
from rm.scorer import Scored
from rm.scores import write_scores
from rm.sides import number_texts
from rubric_data.errors import UserError
from rubric_data.files import CONFIG_NAME, write_json, write_text
from rubric_data.io import read_judged
from rubric_data.pairs import REWARD_DECIMALS, orders, same_prompt_pairs
from rubric_data.records import Criterion, JudgedResponse, Split
from rubric_data.reward import rubric_reward
from rubric_data.split import of_split

EVALUATIONS = 4  # of a peer in training, evenly spread; the last is at its end
VALIDATION_SHARE = 0.1  # of the training tokens, that each evaluation reads
_TOKENS_PER_BATCH = 8192  # in one forward pass without gradients
_DELIMITERS = ["<|a2j:state|>", "<|a2j:q|>", "<|a2j:opt|>", "<|a2j:/opt|>", "<|a2j:decide|>"]  # any2jev's own
_console = Console(stderr=True)


@dataclass(frozen=True)
class Terms:
    """What a peer is given: to read ``tokens`` in about ``steps`` optimiser steps, and the settings of ``run``."""

    run: str
    data: str
    use_verifiers: bool
    model: str
    max_length: int
    lora_rank: int
    lora_alpha: int
    lora_layers: int | None
    learning_rate: float
    head_learning_rate: float
    weight_decay: float
    warmup_ratio: float
    seed: int
    steps: int
    tokens: int

    @classmethod
    def of(cls, run: Path) -> "Terms":
        """Those of the finished training run in ``run``. Raises UserError if it is none, or trained every weight."""
        try:
            report = json.loads((run / "train.json").read_text(encoding="utf-8"))
            config = TrainConfig(**json.loads((run / CONFIG_NAME).read_text(encoding="utf-8")), resume=False)
            passes = max(entry["epoch"] for entry in report["log"] if "epoch" in entry)
            steps, tokens = report["steps"], round(passes * report["tokens_per_epoch"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{run}: is no finished training run (train.json); give the folder of one") from None
        if not config.lora_rank:
            raise UserError(f"{run}: trained every weight, which peers do not; give a run with LoRA")
        shared = {name: getattr(config, name) for name in cls.__dataclass_fields__ if hasattr(config, name)}
        return cls(run=str(run), **shared, steps=steps, tokens=tokens)

    def scaled(self, tokens: int) -> "Terms":
        """The same with ``tokens`` to read, and steps of the same size. Raises UserError on no tokens."""
        if tokens < 1:
            raise UserError(f"tokens: must be at least 1, got {tokens}; leave it out for as many as the run read")
        return replace(self, tokens=tokens, steps=max(1, round(self.steps * tokens / self.tokens)))


@dataclass(frozen=True)
class Reading:
    """What our model reads of a prompt and a response, without any criterion: ids, and how many tokens were cut."""

    ids: list[int]
    cut: int


class Texts:
    """The prompts and responses of ``records`` as our model reads them, encoded when first asked for."""

    def __init__(self, records: Sequence[JudgedResponse], encoder: Encoder) -> None:
        self.records = records
        self.encoder = encoder
        self.reading = functools.cache(self._reading)

    def _reading(self, place: int) -> Reading:
        record = self.records[place]
        encoded = self.encoder.encode(record.prompt, [record.response], [record.rubric.criteria])
        ids = encoded.tree.tokens + encoded.tree.branches[0].tokens
        return Reading(ids, encoded.prompt_cut + encoded.response_cut[0])

    def text(self, place: int) -> str:
        """The same as text, for whoever has a tokenizer of their own."""
        reading, record = self.reading(place), self.records[place]
        if reading.cut:
            return str(self.encoder.tokenizer.decode(reading.ids, skip_special_tokens=True))
        return "".join((*template.prompt_segment(record.prompt), *template.response_segment(record.response)))


class Best:
    """The trainable weights with the least validation loss so far."""

    def __init__(self) -> None:
        self.log: list[dict[str, float]] = []
        self._weights: dict[str, torch.Tensor] = {}

    @property
    def step(self) -> int:
        """After which optimiser step they stood."""
        return int(min(self.log, key=lambda entry: entry["loss"])["step"])

    def offer(self, model: torch.nn.Module, step: int, loss: float) -> None:
        """Keep the weights of ``model`` if ``loss`` is the least yet. Raises UserError if it is no number."""
        if not math.isfinite(loss):
            raise UserError(f"validation loss is {loss} after step {step}; lower --learning_rate")
        self.log.append({"step": step, "loss": round(loss, 6)})
        if self.step == step:
            trained = ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
            self._weights = {name: weight.detach().clone() for name, weight in trained}

    def restore(self, model: torch.nn.Module) -> None:
        """Put them back."""
        model.load_state_dict(self._weights, strict=False)


def drawn(length: Callable[[int], int], count: int, tokens: float, seed: int, *, again: bool) -> list[int]:
    """Places below ``count`` in random order until their lengths reach ``tokens``, or there are no more.

    With ``again`` there always are more: once all have come, they come again in another order.
    """
    random = Random(seed)
    chosen: list[int] = []
    used = 0
    while used < tokens:
        for place in random.sample(range(count), count):
            chosen.append(place)
            used += length(place)
            if used >= tokens:
                break
        if not again:
            break
    return chosen


def evaluation_steps(steps: int) -> set[int]:
    """After which of ``steps`` optimiser steps a peer is looked at."""
    return {math.ceil(steps * part / EVALUATIONS) for part in range(1, EVALUATIONS + 1)}


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# --- Bradley-Terry ---------------------------------------------------------------------------------------------------


def ranked_pairs(records: Sequence[JudgedResponse]) -> list[tuple[int, int]]:
    """(better, worse) for all pairs of responses to one prompt that the judge's rewards tell apart."""
    rewards = np.array([rubric_reward(record.rubric, record.values()) for record in records], float)
    pairs = same_prompt_pairs(number_texts(record.prompt for record in records))
    order = orders(np.round(rewards, REWARD_DECIMALS), pairs)
    both = zip(order, pairs.first_M.tolist(), pairs.second_M.tolist(), strict=True)
    return [(first, second) if sign > 0 else (second, first) for sign, first, second in both if sign in (1, -1)]


class _ScalarHead(torch.nn.Linear):
    """A linear head in float32, as ours is: in bfloat16 near rewards would tie."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.float())


def scalar_model(terms: Terms) -> Any:
    """The backbone with adapters and one linear output, as reward trainers want it."""
    model = AutoModelForSequenceClassification.from_pretrained(
        resolve_model(terms.model), num_labels=1, dtype=native_dtype(_device()), attn_implementation="sdpa"
    )
    model.score = _ScalarHead(model.config.hidden_size, 1, bias=False)
    torch.nn.init.normal_(model.score.weight, std=model.config.initializer_range)
    layers = model.base_model.layers
    adapted = attach_lora(model, layers, rank=terms.lora_rank, alpha=terms.lora_alpha, top_layers=terms.lora_layers)
    model.score.requires_grad_(True)
    return adapted


class _KeepBest(TrainerCallback):
    """Has the Trainer evaluate at `evaluation_steps`, and keeps the best weights."""

    def __init__(self, best: Best) -> None:
        self.best = best

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = state.global_step in evaluation_steps(state.max_steps)

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        self.best.offer(model, state.global_step, metrics["eval_loss"])


def train_bradley_terry(terms: Terms, train: Texts, validation: Texts) -> tuple[Any, dict[str, Any]]:
    """A model that gives prompt and response one number, and the facts of its training."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    def pairs_of(texts: Texts, tokens: float, *, again: bool) -> tuple[list[tuple[int, int]], int]:
        every = ranked_pairs(texts.records)
        if not every:
            raise UserError("bt: the judge's rewards tell no two responses to one prompt apart; judge more of them")

        def length(place: int) -> int:
            return sum(len(texts.reading(side).ids) for side in every[place])

        chosen = drawn(length, len(every), tokens, terms.seed, again=again)
        return [every[place] for place in chosen], sum(map(length, chosen))

    def dataset(texts: Texts, pairs: Sequence[tuple[int, int]]) -> Dataset:
        sides = [tuple(texts.reading(side).ids for side in pair) for pair in pairs]
        return Dataset.from_list([{"chosen_ids": better, "rejected_ids": worse} for better, worse in sides])

    pairs, tokens = pairs_of(train, terms.tokens, again=True)
    held_out, _ = pairs_of(validation, VALIDATION_SHARE * terms.tokens, again=False)
    set_seed(terms.seed)
    best = Best()
    with tempfile.TemporaryDirectory() as folder:
        size = max(1, round(len(pairs) / terms.steps))
        trainer = RewardTrainer(
            scalar_model(terms),
            RewardConfig(
                output_dir=folder,
                per_device_train_batch_size=size,
                per_device_eval_batch_size=size,
                num_train_epochs=1,
                learning_rate=terms.learning_rate,
                weight_decay=terms.weight_decay,
                warmup_steps=terms.warmup_ratio,
                lr_scheduler_type="cosine",
                logging_steps=0.1,
                save_strategy="no",
                report_to="none",
                prediction_loss_only=True,
                gradient_checkpointing=False,
                bf16=False,  # the backbone has the dtype it shall have
                max_length=None,  # cut already
                dataloader_pin_memory=False,
                use_cpu=_device() == "cpu",
                seed=terms.seed,
            ),
            train_dataset=dataset(train, pairs),
            eval_dataset=dataset(validation, held_out),
            processing_class=train.encoder.tokenizer,
            callbacks=[_KeepBest(best)],
        )
        steps = trainer.train().global_step
    best.restore(trainer.model)
    return trainer.model.eval(), {
        "steps": steps,
        "tokens": tokens,
        "pairs": len(pairs),
        "different_pairs": len(set(pairs)),
        "validation_pairs": len(held_out),
        "validation": best.log,
        "kept_step": best.step,
    }


@torch.inference_mode()
def scalar_rewards(model: Any, texts: Texts) -> list[float]:
    """The number that ``model`` gives each response, in their order."""
    pad = texts.encoder.tokenizer.pad_token_id
    by_length = sorted(range(len(texts.records)), key=lambda place: -len(texts.reading(place).ids))
    rewards: dict[int, float] = {}
    batches = list(budget_batches([len(texts.reading(place).ids) for place in by_length], _TOKENS_PER_BATCH))
    for batch in track(batches, "scoring", console=_console, transient=True):
        places = [by_length[index] for index in batch]
        rows = [texts.reading(place).ids for place in places]
        widest = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (widest - len(row)) for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (widest - len(row)) for row in rows], device=model.device)
        found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(-1)
        rewards |= dict(zip(places, found.tolist(), strict=True))
    return [rewards[place] for place in range(len(texts.records))]


def score_bradley_terry(model: Any, texts: Texts, output: Path) -> None:
    """Write the reward of each response."""
    rows = [
        {
            "prompt_id": record.prompt_id,
            "response_id": record.response_id,
            "generator": record.generator,
            "reward": reward,
            "criteria": None,
        }
        for record, reward in zip(texts.records, scalar_rewards(model, texts), strict=True)
    ]
    write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# --- any2jev ---------------------------------------------------------------------------------------------------------


def decision_model(
    name: str,
    *,
    rank: int,
    alpha: int,
    top_layers: int | None = None,
    max_state: int,
    max_branch: int = 1024,
    trainable_delimiters: bool = True,
    device: str = "cpu",
) -> Any:
    """A fresh DecisionModel. Its delimiters are added to a saved copy of the backbone: its own way fails here."""
    from any2jev.model import DecisionModel

    with tempfile.TemporaryDirectory() as folder:
        tokenizer, model = load_tokenizer(name), load_causal_lm(name, dtype=native_dtype(device))
        tokenizer.add_special_tokens({"additional_special_tokens": _DELIMITERS})
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        backbone = model.base_model
        return DecisionModel.from_base(
            folder,
            lora_r=rank,
            lora_alpha=alpha,
            lora_dropout=0.0,
            lora_targets=linear_maps(backbone, backbone.layers, top_layers),
            dtype=native_dtype(device),
            device=device,
            max_state=max_state,
            max_branch=max_branch,
            trainable_delimiters=trainable_delimiters,
        )


@dataclass
class Decider:
    """Puts criteria to a DecisionModel as its yes/no questions; P(yes) is the sigmoid of ``factor`` times a logit."""

    decision: Any
    factor: float = 1.0  # one over the temperature

    def packed(self, texts: Texts, place: int, criteria: Sequence[Criterion]) -> Any:
        """Prompt and response of a record with its questions."""
        from any2jev.schema import QuestionSpec

        specs = [
            QuestionSpec(one.id, "noul", template.criterion_segment(one).body, ["no", "yes"], ["false", "true"])
            for one in criteria
        ]
        return self.decision.encode(texts.text(place), specs)

    def logits(self, packed: Any) -> torch.Tensor:
        """Of "yes" over "no", one for each question, float32."""
        return torch.stack([options[1] - options[0] for options in self.decision.logits([packed])[0]])


def _judged(record: JudgedResponse) -> tuple[list[Criterion], list[float]]:
    """The criteria of a record that have a verdict, and the verdicts."""
    both = zip(record.rubric.criteria, record.values(), strict=True)
    known = [(criterion, value) for criterion, value in both if not math.isnan(value)]
    return [criterion for criterion, _ in known], [value for _, value in known]


_Example = tuple[Any, list[float]]  # packed questions and their verdicts


def _examples(decider: Decider, texts: Texts, tokens: float, seed: int, *, again: bool) -> list[_Example]:
    """Responses drawn for so many tokens, with the questions that have verdicts."""
    judged = [place for place, record in enumerate(texts.records) if _judged(record)[0]]
    if not judged:
        raise UserError("any2jev: a split it needs has no verdicts; judge training and validation responses")

    @functools.cache
    def example(index: int) -> _Example:
        criteria, values = _judged(texts.records[judged[index]])
        return decider.packed(texts, judged[index], criteria), values

    chosen = drawn(lambda index: len(example(index)[0]), len(judged), tokens, seed, again=again)
    return [example(index) for index in chosen]


def train_any2jev(terms: Terms, train: Texts, validation: Texts) -> tuple[Decider, dict[str, Any]]:
    """A DecisionModel that answers criteria, and the facts of its training."""
    set_seed(terms.seed)
    decision = decision_model(
        terms.model,
        rank=terms.lora_rank,
        alpha=terms.lora_alpha,
        top_layers=terms.lora_layers,
        max_state=2 * terms.max_length,  # cut already; its tokenizer may cut the text into more tokens
        max_branch=2 * terms.max_length,
        device=_device(),
    )
    decider = Decider(decision)
    examples = _examples(decider, train, terms.tokens, terms.seed, again=True)
    held_out = _examples(decider, validation, VALIDATION_SHARE * terms.tokens, terms.seed, again=False)
    gold = np.array([value for _, values in held_out for value in values])

    @torch.inference_mode()
    def answers() -> np.ndarray:
        decision.eval()
        found = torch.cat([decider.logits(packed) for packed, _ in held_out]).cpu().numpy()
        decision.train()
        return found

    steps = min(terms.steps, len(examples))
    head = list(decision.head.parameters())
    of_head = {id(weight) for weight in head}
    rest = [weight for weight in decision.trainable_parameters() if id(weight) not in of_head]
    groups = [{"params": rest, "lr": terms.learning_rate}, {"params": head, "lr": terms.head_learning_rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=terms.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(terms.warmup_ratio * steps), steps)
    best = Best()
    decision.train()
    batches = np.array_split(np.arange(len(examples)), steps)
    for step, batch in enumerate(track(batches, "training", console=_console, transient=True), 1):
        verdicts = sum(len(examples[index][1]) for index in batch)
        for packed, values in (examples[index] for index in batch):
            target = torch.tensor(values, device=decision.device)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(decider.logits(packed), target, reduction="sum")
            (loss / verdicts).backward()
        torch.nn.utils.clip_grad_norm_(decision.trainable_parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step in evaluation_steps(steps):
            best.offer(decision, step, _cross_entropy(answers(), gold))
    best.restore(decision)
    decider.factor = fit_curve("temperature", answers(), gold).a
    decision.backbone = decision.backbone.merge_and_unload()
    decision.eval()
    return decider, {
        "steps": steps,
        "tokens": sum(len(packed) for packed, _ in examples),
        "responses": len(examples),
        "different_responses": len({id(packed) for packed, _ in examples}),
        "verdicts": sum(len(values) for _, values in examples),
        "validation_verdicts": len(gold),
        "validation": best.log,
        "kept_step": best.step,
        "temperature": round(1 / decider.factor, 6),
    }


def _cross_entropy(logits_N: np.ndarray, gold_N: np.ndarray) -> float:
    return float(np.mean(np.logaddexp(0, logits_N) - gold_N * logits_N))


@torch.inference_mode()
def score_any2jev(decider: Decider, texts: Texts, output: Path) -> None:
    """Write P(met) of every criterion of each response."""
    scored = []
    for place, record in track(list(enumerate(texts.records)), "scoring", console=_console, transient=True):
        logits_K = decider.logits(decider.packed(texts, place, record.rubric.criteria)).cpu().double().numpy()
        probs_K = expit(decider.factor * logits_K)
        scored.append(Scored(probs_K, logits_K, rubric_reward(record.rubric, probs_K), texts.reading(place).cut))
    write_scores(output, texts.records, scored)


# --- the command -----------------------------------------------------------------------------------------------------

PEERS: dict[str, tuple[Callable[[Terms, Texts, Texts], Any], Callable[[Any, Texts, Path], None]]] = {
    "bt": (train_bradley_terry, score_bradley_terry),
    "any2jev": (train_any2jev, score_any2jev),
}


def run(peer: str, terms: Terms, splits: Sequence[Split], output: Path, also: Path | None = None) -> dict[str, Any]:
    """Train ``peer`` and score ``splits`` into ``output``; the facts of a finished one are returned as they are.

    ``also``: a file of responses that are scored likewise, into ``output`` too. Raises UserError on bad input, or if
    ``output`` holds the scores of other terms.
    """
    if output.suffix != ".jsonl":
        raise UserError(f"{output}: scores of peers are .jsonl; choose such an --output")
    beside = output.with_suffix(".json")
    config = {"peer": peer, "splits": list(splits), "also": None if also is None else str(also), **asdict(terms)}
    if output.exists() and beside.exists():
        facts = json.loads(beside.read_text(encoding="utf-8"))
        changed = sorted(key for key in config if facts["config"].get(key) != config[key])
        if changed:
            raise UserError(f"{output}: exists already, with another {', '.join(changed)}; choose another --output")
        return facts
    made = circumstances(config)  # before hours of work: it needs a checkout
    if peer == "any2jev":
        made["versions"]["any2jev"] = _any2jev_version()
    records, _ = load_training(terms.data, use_verifiers=terms.use_verifiers)
    encoder = Encoder(load_tokenizer(terms.model), terms.max_length)
    parts = [of_split(records, split) for split in ("train", "validation")]
    asked_too = [] if also is None else read_judged(also)
    parts.append([record for split in splits for record in of_split(records, split)] + asked_too)
    train, validation, asked = (Texts(part, encoder) for part in parts)
    learn, score = PEERS[peer]
    begun = time.perf_counter()
    model, training = learn(terms, train, validation)
    trained = time.perf_counter()
    score(model, asked, output)
    scoring = {
        "responses": len(asked.records),
        "cut": sum(asked.reading(place).cut > 0 for place in range(len(asked.records))),
        "seconds": round(time.perf_counter() - trained, 1),
    }
    training["seconds"] = round(trained - begun, 1)
    facts = {"name": f"peer-{peer}", **made, "training": training, "scoring": scoring}
    write_json(beside, facts)
    return facts


def _any2jev_version() -> str:
    try:
        return importlib.metadata.version("any2jev")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("any2jev is not installed; run: pip install -c constraints.txt 'rubric-rm[bench]'") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, choices=PEERS)
    parser.add_argument("--run", required=True, type=Path, help="folder of our finished training run, for the terms")
    parser.add_argument("--output", required=True, type=Path, help=".jsonl file of scores to write")
    parser.add_argument("--data", help="judged responses with splits; default: the run's")
    parser.add_argument("--splits", nargs="+", choices=get_args(Split), default=["test"], help="which to score")
    parser.add_argument("--also", type=Path, help="further responses to score (.jsonl or .parquet)")
    parser.add_argument("--tokens", type=int, help="to train on; default: as many as the run read")
    parser.add_argument("--learning_rate", type=float, help="of the backbone at its peak; default: the run's")
    parser.add_argument("--seed", type=int, help="of what is drawn and of the start; default: the run's")
    given = parser.parse_args()
    keep_memory()
    try:
        terms = Terms.of(given.run)
        if given.tokens is not None:
            terms = terms.scaled(given.tokens)
        changed = {name: getattr(given, name) for name in ("data", "learning_rate", "seed")}
        terms = replace(terms, **{name: value for name, value in changed.items() if value is not None})
        facts = run(given.peer, terms, given.splits, given.output, given.also)
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    _console.print_json(data={key: facts[key] for key in ("training", "scoring")})


if __name__ == "__main__":
    main()
