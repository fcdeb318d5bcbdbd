"""Scoring and training speed beside the alternatives, all in one process: `make bench`, or

    python -m benchmarks.speed                 all but the last, about twenty minutes on two cores
    python -m benchmarks.speed score growth    some of them
    python -m benchmarks.speed train --works a b    on some of the workloads

Claims: score (against one padded sequence per criterion, a P(yes) judge), any2jev, json (a JSON judge), train,
efficiency, growth, memory, files (`rubric-rm score` on 2,000 responses, ten minutes more). Every claim becomes
benchmarks/results/speed-*.json; a table closes the run, and docs/performance.md quotes it. Needs any2jev 0.1 (extra
`bench`) and ../shared/data/realsumm.parquet for the parts that name them; they are left out, saying so, where absent.
"""

import argparse
import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.record import RESULTS, ROOT, quoted, spread, table, write_record
from rm import template
from rm.backbone import load_causal_lm, load_tokenizer, native_dtype, resolve_model
from rm.config import ScoreConfig
from rm.encoding import Encoder
from rm.layout import Tree, pack
from rm.local_judge import LocalJudge
from rm.lora import attach_lora
from rm.memory import keep_memory
from rm.model import RubricRewardModel
from rm.scorer import RubricScorer, run_score
from rubric_data.files import write_text
from rubric_data.io import read_judged, write_judged
from rubric_data.judges import JudgeRequest
from rubric_data.records import Criterion, JudgedResponse, Rubric

REALSUMM = ROOT.parent / "shared" / "data" / "realsumm.parquet"
MODEL = "smollm2"
REPEATS = 5
_BATCHES = (1, 4, 8, 16)  # a baseline is given the fastest
_MOST_SEQUENCES = 24  # of a baseline's timing: evenly drawn, so that its rate stands for all of them
_ANY2JEV_TARGETS = {"a": "2", "b": "3", "realsumm": "5"}  # scoring and training, by workload
_JSON_TOKENS = 9  # of a generated reply, for each criterion: "c10": "yes",
_DELIMITERS = ["<|a2j:state|>", "<|a2j:q|>", "<|a2j:opt|>", "<|a2j:/opt|>", "<|a2j:decide|>"]  # any2jev's own
# one token each, with the space before it
_COMMON = """
the of and to in is that it was for on are with as they at be this from have or by one had not but what all were when
we there can an your which their said if do will each about how up out them then she many some so these would other
into has more her two like him see time could no make than first been its who now people my made over did down only way
"""
_console = Console()


@dataclass(frozen=True)
class Work:
    """Responses under rubrics: what everybody is asked to answer."""

    name: str
    prompts: list[str]
    responses: list[str]
    rubrics: list[Rubric]

    @property
    def criteria(self) -> int:
        """Questions in all."""
        return sum(len(rubric.criteria) for rubric in self.rubrics)

    @functools.cached_property
    def sequences(self) -> list[str]:
        """One text for each question, as the padded baselines read it."""
        return [
            "".join(
                "".join(segment)
                for segment in (
                    template.prompt_segment(prompt),
                    template.response_segment(response),
                    template.criterion_segment(criterion),
                )
            )
            for prompt, response, rubric in zip(self.prompts, self.responses, self.rubrics, strict=True)
            for criterion in rubric.criteria
        ]

    def trees(self, encoder: Encoder) -> list[Tree]:
        """The work as trees, one for each prompt."""
        found = []
        for prompt in dict.fromkeys(self.prompts):
            places = [i for i, other in enumerate(self.prompts) if other == prompt]
            criteria = [self.rubrics[i].criteria for i in places]
            found.append(encoder.encode(prompt, [self.responses[i] for i in places], criteria).tree)
        return found


def works(names: Sequence[str]) -> list[Work]:
    """The workloads of that name: (a), (b), and real prompts where the data is there."""
    makers = {
        "a": lambda: made_up("a", prompts=4, prompt=200, responses=1, response=200, criteria=10, criterion=25),
        "b": lambda: made_up("b", prompts=1, prompt=200, responses=8, response=200, criteria=10, criterion=25),
        "realsumm": real,
    }
    return [makers[name]() for name in names if name != "realsumm" or REALSUMM.exists()]


def made_up(
    name: str, *, prompts: int, prompt: int, responses: int, response: int, criteria: int, criterion: int
) -> Work:
    """Random common words of so many tokens; every response has a rubric of the same size."""
    random, words = Random(name), _COMMON.split()

    def text(tokens: int) -> str:
        return " ".join(random.choices(words, k=tokens))

    work = Work(name, [], [], [])
    for _ in range(prompts):
        asked = text(prompt)
        rubric = Rubric(criteria=tuple(Criterion(id=f"c{k}", text=text(criterion - 4)) for k in range(criteria)))
        for _ in range(responses):
            work.prompts.append(asked)
            work.responses.append(text(response - 15))
            work.rubrics.append(rubric)
    return work


def real(prompts: int = 1) -> Work:
    """All responses to the first test prompts of realsumm."""
    records = [record for record in read_judged(REALSUMM) if record.split == "test"]
    chosen = list(dict.fromkeys(record.prompt for record in records))[:prompts]
    records = [record for record in records if record.prompt in chosen]
    return Work("realsumm", [r.prompt for r in records], [r.response for r in records], [r.rubric for r in records])


# --- who answers -----------------------------------------------------------------------------------------------------

Run = Callable[[], int]  # answers, and says how many questions that were


def ours(work: Work) -> Run:
    """The reward model, from text to rewards."""
    scorer = _scorer()

    def run() -> int:
        scorer.score(work.prompts, work.responses, work.rubrics)
        return work.criteria

    return run


@functools.cache
def _scorer() -> RubricScorer:
    return RubricScorer.zero_shot(MODEL, use_verifiers=False, tokens_per_batch=ScoreConfig.tokens_per_batch)


def padded(work: Work) -> Run:
    """One padded sequence per criterion in AutoModelForSequenceClassification with sdpa, as reward trainers score."""
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(MODEL)
    model = AutoModelForSequenceClassification.from_pretrained(
        resolve_model(MODEL), num_labels=1, dtype=native_dtype(), attn_implementation="sdpa"
    ).eval()

    @torch.inference_mode()
    def score(texts: Sequence[str], batch: int) -> None:
        ordered = sorted(texts, key=len)
        for first in range(0, len(ordered), batch):
            model(**tokenizer(ordered[first : first + batch], return_tensors="pt", padding=True, truncation=True))

    return _tuned(work.sequences, score)


def p_yes(work: Work) -> Run:
    """The same backbone as a judge: P(yes) from the first token, one sequence per criterion."""
    judge = LocalJudge(MODEL)
    requests = [
        JudgeRequest(prompt, response, (criterion,))
        for prompt, response, rubric in zip(work.prompts, work.responses, work.rubrics, strict=True)
        for criterion in rubric.criteria
    ]
    requests = _evenly(requests)

    def run() -> int:
        judge.judge(requests)
        return len(requests)

    return run


def json_judge(work: Work) -> Run:
    """The same backbone writing one JSON reply with all criteria, greedily; the length of a whole reply is forced."""
    tokenizer, model = load_tokenizer(MODEL), load_causal_lm(MODEL, dtype=native_dtype())
    prompt, response, rubric = work.prompts[0], work.responses[0], work.rubrics[0]
    listed = "\n".join(f"{criterion.id}: {criterion.text}" for criterion in rubric.criteria)
    message = (
        f"Prompt:\n{prompt}\n\nResponse:\n{response}\n\nCriteria:\n{listed}\n\nAnswer in JSON, yes or no for each."
    )
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    length = _JSON_TOKENS * len(rubric.criteria)

    @torch.inference_mode()
    def run() -> int:
        model.generate(**inputs, do_sample=False, max_new_tokens=length, min_new_tokens=length)
        return len(rubric.criteria)

    return run


def any2jev(work: Work, *, train: bool = False) -> Run:
    """any2jev's DecisionModel on the same backbone: one packed state with its questions under a dense mask."""
    model = _any2jev(train)
    from any2jev.schema import SystemOneRequest, to_specs

    asked = []
    for prompt, response, rubric in zip(work.prompts, work.responses, work.rubrics, strict=True):
        state = "".join((*template.prompt_segment(prompt), *template.response_segment(response)))
        questions = {c.id: {"type": "noul", "instructions": c.text} for c in rubric.criteria}
        labels = {c.id: place % 2 == 0 for place, c in enumerate(rubric.criteria)} if train else None
        request = SystemOneRequest.model_validate({"state": state, "questions": questions})
        asked.append((state, to_specs(request, labels)))
    asked = _evenly(asked, 4)
    criteria = sum(len(specs) for _, specs in asked)

    def run() -> int:
        for state, specs in asked:
            packed = model.encode(state, specs)
            if not train:
                with torch.inference_mode():
                    model.probs([packed])
                continue
            logits = model.logits([packed])[0]
            losses = [
                torch.nn.functional.cross_entropy(row[None], torch.tensor([place % 2]))
                for place, row in enumerate(logits)
            ]
            torch.stack(losses).sum().backward()
        return criteria

    return run


def _any2jev(train: bool) -> Any:
    """A fresh DecisionModel. Its delimiters are added to a saved copy of the backbone: its own way fails here."""
    from any2jev.model import DecisionModel

    with tempfile.TemporaryDirectory() as folder:
        tokenizer, model = load_tokenizer(MODEL), load_causal_lm(MODEL, dtype=native_dtype())
        tokenizer.add_special_tokens({"additional_special_tokens": _DELIMITERS})
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        decision = DecisionModel.from_base(
            folder, dtype=native_dtype(), device="cpu", max_state=4096, lora_dropout=0.0, trainable_delimiters=False
        )
    if not train:
        decision.backbone = decision.backbone.merge_and_unload()
        decision.eval()
    return decision


def ours_training(work: Work) -> Run:
    """Forward and backward of the reward model with LoRA on all layers, one prompt's tree at a time."""
    model = RubricRewardModel.from_language_model(MODEL, max_length=_scorer().encoder.max_length)
    model.add_lora(16, 32)
    encoder = Encoder(load_tokenizer(MODEL), model.max_length)

    def run() -> int:
        for tree in work.trees(encoder):
            model(*pack([tree])).sum().backward()
        return work.criteria

    return run


def padded_training(work: Work) -> Run:
    """Forward and backward of `padded` with LoRA on all layers."""
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(MODEL)
    model = AutoModelForSequenceClassification.from_pretrained(
        resolve_model(MODEL), num_labels=1, dtype=native_dtype(), attn_implementation="sdpa"
    )
    model = attach_lora(model, model.model.layers, rank=16, alpha=32)

    def learn(texts: Sequence[str], batch: int) -> None:
        ordered = sorted(texts, key=len)
        for first in range(0, len(ordered), batch):
            inputs = tokenizer(ordered[first : first + batch], return_tensors="pt", padding=True, truncation=True)
            model(**inputs).logits.sum().backward()

    return _tuned(work.sequences, learn)


def _tuned(texts: Sequence[str], run: Callable[[Sequence[str], int], None]) -> Run:
    """``run`` on an even share of the texts, at the fastest of `_BATCHES`."""
    texts = _evenly(texts)
    run(texts[:2], 2)
    seconds = {batch: _seconds(functools.partial(run, texts[: max(_BATCHES)], batch)) for batch in _BATCHES}
    best = min(seconds, key=seconds.__getitem__)

    def measured() -> int:
        run(texts, best)
        return len(texts)

    return measured


def _evenly(items: Sequence[Any], most: int = _MOST_SEQUENCES) -> list[Any]:
    step = max(1, -(-len(items) // most))
    return list(items[::step])


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _rates(first: Run, second: Run, repeats: int = REPEATS) -> tuple[list[float], list[float]]:
    """Questions a second of both, in turns, after a warm-up."""
    found: tuple[list[float], list[float]] = ([], [])
    first(), second()
    for _ in range(repeats):
        for rates, run in zip(found, (first, second), strict=True):
            begin = time.perf_counter()
            rates.append(run() / (time.perf_counter() - begin))
    return found


# --- claims ----------------------------------------------------------------------------------------------------------

Row = tuple[str, str, str, str]  # what, ours, the other, ratio with its target


def token_ratio(work: Work) -> float:
    """Tokens of one sequence per criterion over tokens of the trees."""
    tokenizer = load_tokenizer(MODEL)
    separate = sum(len(ids) for ids in tokenizer(work.sequences)["input_ids"])
    return separate / sum(tree.length for tree in work.trees(_scorer().encoder))


def claim_score(works: Sequence[Work]) -> list[Row]:
    """Scoring against every alternative on every workload."""
    rows = []
    for work in works:
        ratio = token_ratio(work)
        others: list[tuple[str, Callable[[Work], Run], str]] = [
            ("padded", padded, f"{0.95 * ratio:.1f}"),
            ("p-yes", p_yes, f"{ratio:.1f}"),
        ]
        for name, build, target in others:
            rows.append(_compare(f"score-{work.name}-{name}", ours(work), build(work), target, token_ratio=ratio))
    return rows


def claim_any2jev(works: Sequence[Work]) -> list[Row]:
    """Scoring against any2jev, where it is installed."""
    rows = []
    for work in works:
        if _has_any2jev():
            mine, theirs = _rates(ours(work), any2jev(work))
            target, notes = _ANY2JEV_TARGETS[work.name], _roofline(work, theirs)
            rows.append(
                _recorded(f"score-{work.name}-any2jev", "criteria / s", mine, "any2jev", theirs, target, notes=notes)
            )
    return rows


def claim_json(works: Sequence[Work]) -> list[Row]:
    """Scoring against a judge that writes its answers, one pass over its weights for each token."""
    rows = []
    for work in works:
        mine, theirs = _rates(ours(work), json_judge(work))
        notes = _roofline(work, theirs)
        rows.append(_recorded(f"json-{work.name}", "criteria / s", mine, "json", theirs, "100", notes=notes))
    return rows


def _roofline(work: Work, theirs: Sequence[float]) -> str:
    """How far any pass over the same text could get."""
    model = _scorer().model.backbone
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    tokens = sum(tree.length for tree in work.trees(_scorer().encoder))
    least = 2 * weights * tokens / gemm_peak(model.dtype) / 1e9  # seconds
    best = work.criteria / least / spread(theirs)["median"]
    return (
        f"ours reads {tokens} tokens once; were nothing else to do than its matrix products, at the peak of a product "
        f"of 2048 cubed measured beside it, the ratio would be {best:.1f}"
    )


def claim_train(works: Sequence[Work]) -> list[Row]:
    """Training against one padded sequence per criterion (real prompts), and any2jev."""
    rows = []
    for work in works:
        if work.name == "realsumm":
            rows.append(_compare("train-realsumm-padded", ours_training(work), padded_training(work), "10"))
        if _has_any2jev():
            target = _ANY2JEV_TARGETS[work.name]
            name = f"train-{work.name}-any2jev"
            rows.append(_compare(name, ours_training(work), any2jev(work, train=True), target))
    return rows


def claim_efficiency(works: Sequence[Work]) -> list[Row]:
    """Share of the matrix-product peak measured beside it that scoring reaches; the notes say what limits it."""
    scorer = _scorer()
    maps = [m for m in scorer.model.backbone.modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(m.weight.numel() for m in maps)
    rows = []
    for work in works:
        trees = work.trees(scorer.encoder)
        batch = pack(trees)
        tokens = sum(tree.length for tree in trees)
        with torch.inference_mode():
            scorer.model(*batch)
            flops, peak, share = [], [], []
            for _ in range(REPEATS):
                seconds = _seconds(functools.partial(scorer.model, *batch))
                peak.append(gemm_peak(scorer.model.backbone.dtype, seconds))
                flops.append(2 * weights * tokens / seconds / 1e9)
                share.append(_alone(maps, tokens) / seconds)
        notes = f"the same linear maps on random input, nothing else, take {spread(share)['median']:.0%} of the pass"
        name = f"efficiency-{work.name}"
        rows.append(_recorded(name, "GFLOPS", flops, "matrix product, 2048 cubed", peak, "0.75", notes=notes))
    return rows


def _alone(maps: Sequence[torch.nn.Linear], tokens: int) -> float:
    """Seconds of the linear maps on random input."""
    inputs = {n: torch.randn(tokens, n).to(maps[0].weight.dtype) for n in {m.in_features for m in maps}}
    return _seconds(lambda: [m(inputs[m.in_features]) for m in maps])


def gemm_peak(dtype: torch.dtype, seconds: float = 0.5, size: int = 2048) -> float:
    """GFLOPS of a square matrix product, repeated for about ``seconds``: short bursts may run at another clock."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    once = min(_seconds(lambda: a @ b) for _ in range(3))
    times = max(5, round(seconds / once))
    return times * 2 * size**3 / _seconds(lambda: [a @ b for _ in range(times)]) / 1e9


def claim_growth(_works: Sequence[Work]) -> list[Row]:
    """Time from 10 to 200 criteria on the same prompt and response, over what the tokens grow by."""
    scorer, sizes = _scorer(), (10, 200)
    small, large = (
        made_up("g", prompts=1, prompt=200, responses=1, response=200, criteria=k, criterion=25).trees(scorer.encoder)
        for k in sizes
    )
    batches = [pack(trees) for trees in (small, large)]
    tokens = [sum(tree.length for tree in trees) for trees in (small, large)]
    seconds: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for batch in batches:
            scorer.model(*batch)
        for _ in range(REPEATS):
            for found, batch, times in zip(seconds, batches, (8, 1), strict=True):
                found.append(sum(_seconds(functools.partial(scorer.model, *batch)) for _ in range(times)) / times)
    per_token = [[1e6 * s / n for s in found] for found, n in zip(seconds, tokens, strict=True)]
    return [_recorded("growth", "microseconds a token", per_token[1], "10 criteria", per_token[0], "at most 1.1")]


def claim_memory(_works: Sequence[Work]) -> list[Row]:
    """Peak memory of a process that scores 64k tokens in one call, and 16k."""
    peaks = {}
    for tokens in (16_384, 65_536):
        code = f"from benchmarks.speed import peak_gib; print(peak_gib({tokens}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        peaks[tokens] = float(done.stdout.split()[-1])
    return [
        _recorded("memory", "GiB, 65,536 tokens", [peaks[65_536]], "16,384 tokens", [peaks[16_384]], "8 GiB at most")
    ]


def peak_gib(tokens: int) -> float:
    """Peak resident memory of this process after one forward pass over ``tokens`` tokens of workload (b)'s shape."""
    scorer = _scorer()
    tree = made_up("b", prompts=1, prompt=200, responses=8, response=200, criteria=10, criterion=25)
    (one,) = tree.trees(scorer.encoder)
    with torch.inference_mode():
        scorer.model(*pack([one] * (tokens // one.length + 1)))
    # not ru_maxrss, which a process inherits from the one that started it
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**20


def claim_files(_works: Sequence[Work]) -> list[Row]:
    """`rubric-rm score` on 2,000 responses x 10 criteria from Parquet to Parquet, its start included, over memory."""
    work = made_up("files", prompts=250, prompt=40, responses=8, response=40, criteria=10, criterion=12)
    records = [
        JudgedResponse(
            prompt_id=sha256(prompt.encode()).hexdigest()[:16], prompt=prompt, response_id=f"r{place}",
            response=response, rubric=rubric,
        )
        for place, (prompt, response, rubric) in enumerate(
            zip(work.prompts, work.responses, work.rubrics, strict=True)
        )
    ]  # fmt: skip
    part = replace(work, prompts=work.prompts[:200], responses=work.responses[:200], rubrics=work.rubrics[:200])
    memory = ours(part)
    memory()
    with tempfile.TemporaryDirectory() as folder:
        model, source, target = (str(Path(folder) / name) for name in ("model", "in.parquet", "out.parquet"))
        scorer = _scorer()
        scorer.model.save(model)
        scorer.encoder.tokenizer.save_pretrained(model)
        write_judged(source, records)
        rates = [part.criteria / _seconds(memory)]
        files = [work.criteria / _seconds(lambda: run_score(ScoreConfig(model=model, data=source, output=target)))]
        rates.append(part.criteria / _seconds(memory))
    return [_recorded("files", "criteria / s", files, "memory, a tenth of it before and after", rates, "0.9")]


def _compare(name: str, first: Run, second: Run, target: str, **config: Any) -> Row:
    mine, theirs = _rates(first, second)
    return _recorded(name, "criteria / s", mine, name.split("-", 2)[2], theirs, target, **config)


def _recorded(
    name: str,
    unit: str,
    mine: Sequence[float],
    other: str,
    theirs: Sequence[float],
    target: str,
    *,
    notes: str = "",
    **config: Any,
) -> Row:
    path = write_record(
        f"speed-{name}",
        unit=unit,
        samples=mine,
        baseline=other,
        baseline_samples=theirs,
        config={"model": MODEL, "target": target, **config},
        data=REALSUMM if "realsumm" in name else None,
        notes=notes,
    )
    ratio = json.loads(path.read_text(encoding="utf-8"))["ratio"]
    first, second = spread(mine), spread(theirs)
    row = (
        f"{name} ({unit})",
        f"{first['median']:.4g} [{first['q1']:.4g} {first['q3']:.4g}]",
        f"{other}: {second['median']:.4g} [{second['q1']:.4g} {second['q3']:.4g}]",
        f"{ratio:.2f} (target {target})",
    )
    _console.print("  ".join(row), markup=False)
    return row


def _has_any2jev() -> bool:
    if importlib.util.find_spec("any2jev") is None:
        _console.print("any2jev is not installed (pip install 'rubric-rm[bench]'): its comparisons are left out")
        return False
    return True


CLAIMS: dict[str, Callable[[Sequence[Work]], list[Row]]] = {
    "score": claim_score,
    "any2jev": claim_any2jev,
    "json": claim_json,
    "train": claim_train,
    "efficiency": claim_efficiency,
    "growth": claim_growth,
    "memory": claim_memory,
    "files": claim_files,
}
_QUICK = tuple(name for name in CLAIMS if name != "files")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", choices=[*CLAIMS, []], help="which claims; all if none is named")
    known = list(_ANY2JEV_TARGETS)
    parser.add_argument("--works", nargs="+", choices=known, default=known, help="workloads, for the claims on them")
    given = parser.parse_args()
    asked = works(given.works)
    keep_memory()  # as the command line does, for everybody in the process
    if not REALSUMM.exists():
        _console.print(f"{REALSUMM} is not there: its comparisons are left out")
    shown = Table("claim", "ours", "the other", "ratio", title=f"written to {RESULTS.relative_to(Path.cwd())}")
    for name in given.claims or _QUICK:
        for row in CLAIMS[name](asked):
            shown.add_row(*row)
    _console.print(shown)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("speed-*.json"))]
    page = ROOT / "docs" / "performance.md"
    write_text(page, quoted(page.read_text(encoding="utf-8"), "speed", table(records)))


if __name__ == "__main__":
    main()
