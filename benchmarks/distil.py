"""Distil real verdicts and audit the models on prompts they have not seen: what is reached on each data set, by seed.

    python -m benchmarks.distil --data realsumm mrbench --seeds 0 1 2                            validation split
    python -m benchmarks.distil --data realsumm mrbench --seeds 0 1 2 --beside tail blind bt any2jev --split test

Reads ../shared/data. For each data set and seed: train, calibrate, audit, in runs/distil/<data>-<seed>; `--beside` puts
the same with a tail stage or with a part changed (`VARIANTS`) and the peers of `benchmarks.peers` into the same table.
What is finished is not done again and a killed training goes on, so the command may be given at any time. With `--split
test`, which is for the end, the record benchmarks/results/distil-<data>-<beside>.json is written.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.commands import call, options, run
from benchmarks.record import RESULTS, ROOT, circumstances, spread
from rm.model import RubricRewardModel
from rubric_data.files import write_json
from rubric_data.io import read_judged, write_judged
from rubric_data.records import JudgedResponse, Split, content_hash
from rubric_data.split import SPLITS

DATA = ROOT.parent / "shared" / "data"
RUNS = ROOT / "runs" / "distil"
# ours with one part changed: it reads no rubric; learns no pairs; its head does not start as the model's own Yes or No
VARIANTS: dict[str, dict[str, Any]] = {
    "blind": {"rubric_blind": "true"},
    "no_pairs": {"pairwise_weight": 0},
    "cold_head": {},
}
PEERS = ("bt", "any2jev")
BESIDE = ("tail", *VARIANTS, *PEERS)

_COMMON = {"tokens_per_batch": 4400, "lora_layers": 20, "learning_rate": 1.5e-3, "pairwise_weight": 0.1, "patience": 20}
_LONG = {"max_length": 1024, "responses_per_tree": 4, "max_steps": 150, "eval_steps": 30}
# a training costs what it reads: .6 to 1 million tokens, twenty minutes to half an hour on one thread
RECIPES: dict[str, dict[str, Any]] = {
    # the criteria ask about the summary alone: of the article, whatever room is left
    "realsumm": _COMMON | {"max_length": 320, "epochs": 1.5, "eval_steps": 57, "eval_trees": 20},
    "mrbench": _COMMON | {"max_length": 768, "epochs": 3.0, "eval_steps": 50, "eval_trees": 24},
    "structflow": _COMMON | _LONG | {"eval_trees": 40},
    "hellobench": _COMMON | _LONG | {"eval_trees": 24},
}
# of the long responses so many prompts are held out, with so many responses each: an audit reads all, several times
_HELD_OUT: dict[str, dict[Split, int]] = {
    "structflow": {"validation": 20, "test": 40},
    "hellobench": {"validation": 16, "test": 30},
}
_RESPONSES = 12
_TAIL = {"tokens_per_batch": 4400, "learning_rate": 3e-4, "epochs": 1.0, "eval_steps": 10}

Numbers = dict[str, float | None]


def chain(data: str, seed: int, split: str, beside: Sequence[str]) -> dict[str, Any]:
    """What of one data set and seed is not done yet; the audit. Ends the process if a command fails."""
    source, folder = _source(data), RUNS / f"{data}-{seed}"
    ours = _trained(folder / "train", "train", source, {"seed": seed, **RECIPES[data]})
    others: dict[str, Path] = {}
    if "tail" in beside:
        settings = {"seed": seed, "model": ours, **_TAIL}
        others["tail"] = _trained(folder / "tail", "tail", source, settings)
    for name in (name for name in VARIANTS if name in beside):
        with cold_heads() if name == "cold_head" else nullcontext():
            settings = {"seed": seed} | RECIPES[data] | VARIANTS[name]
            others[name] = _trained(folder / name, "train", source, settings)
    for peer in (peer for peer in PEERS if peer in beside):
        others[peer] = folder / f"{peer}.jsonl"
        words = ["--peer", peer, "--run", folder / "train", "--output", others[peer]]
        command = [sys.executable, "-m", "benchmarks.peers", *words, "--splits", "validation", "test"]
        subprocess.run([str(word) for word in command], check=True)  # a finished peer is not trained again
    audit = folder / "-".join(["audit", split, *others])
    if not (audit / "audit.json").exists():
        named = [f"--others=[{', '.join(f'{name}={path}' for name, path in others.items())}]"] if others else []
        call("audit", "--model", ours, "--data", source, "--output", audit, "--split", split, *named)
    return json.loads((audit / "audit.json").read_text(encoding="utf-8"))


@contextmanager
def cold_heads() -> Iterator[None]:
    """Meanwhile verdict heads start at random, as a classifier's would."""
    warm = RubricRewardModel.from_language_model

    def cold(*args: Any, **options: Any) -> RubricRewardModel:
        model = warm(*args, **options)
        torch.nn.init.normal_(model.head.weight, std=0.02)
        return model

    with mock.patch.object(RubricRewardModel, "from_language_model", cold):
        yield


def _source(data: str) -> Path:
    """The file of ``data``, with less of what is held out where `_HELD_OUT` says so: what comes first by a hash."""
    whole = DATA / f"{data}.parquet"
    if data not in _HELD_OUT:
        return whole
    path = RUNS / f"{data}.parquet"
    if not path.exists():
        records = read_judged(whole)
        write_judged(path, [one for split in SPLITS for one in _kept(records, split, _HELD_OUT[data].get(split))])
    return path


def _kept(records: Sequence[JudgedResponse], split: Split, prompts: int | None) -> list[JudgedResponse]:
    """Those of a split: all, or of so many prompts `_RESPONSES` each."""
    mine = [record for record in records if record.split == split]
    if prompts is None:
        return mine
    found: dict[str, list[JudgedResponse]] = {}
    for record in sorted(mine, key=lambda record: content_hash(record.response_id)):
        found.setdefault(record.prompt_id, []).append(record)
    return [record for name in sorted(found, key=content_hash)[:prompts] for record in found[name][:_RESPONSES]]


def _trained(folder: Path, command: str, source: Path, settings: dict[str, Any]) -> Path:
    """The calibrated model of one training, done or gone on with if need be."""
    model = folder / "model"
    if not (folder / f"{command}.json").exists():
        run(folder, command, "--data", source, *options(settings))
    if not (model / "calibration.json").exists():
        call("calibrate", "--model", model, "--data", source)
    return model


def numbers(audit: dict[str, Any]) -> dict[str, Numbers]:
    """By predictor: agreement on verdicts, pair accuracy overall and in the tail with ties as half; None: has none."""
    return {
        name: {key: _value(one["criterion"], key) for key in ("auroc", "accuracy", "brier", "ece")}
        | {key: _value(one["reward"][key], "half") for key in ("pair_accuracy", "tail_pair_accuracy")}
        for name, one in audit["predictors"].items()
    }


def _value(statistics: dict[str, Any] | None, key: str) -> float | None:
    return None if statistics is None or statistics.get(key) is None else statistics[key]["value"]


def over_seeds(seeds: Sequence[dict[str, Numbers]]) -> dict[str, dict[str, Any]]:
    """The spread of each number over seeds; None where a predictor has no such number."""
    found: dict[str, dict[str, Any]] = {}
    for name, row in seeds[0].items():
        values = {key: [one[name][key] for one in seeds] for key in row}
        found[name] = {
            key: None if None in some else spread([value for value in some if value is not None])
            for key, some in values.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(RECIPES), default=["realsumm", "mrbench"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--beside", nargs="*", choices=BESIDE, default=[])
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    arguments = parser.parse_args()
    if not DATA.exists():
        sys.exit(f"{DATA}: the judged responses are not there, and nothing can be distilled")
    for data in arguments.data:
        seeds = [numbers(chain(data, seed, arguments.split, arguments.beside)) for seed in arguments.seeds]
        _show(f"{data}, {arguments.split}", dict(zip(arguments.seeds, seeds, strict=True)))
        if arguments.split == "test":
            config = {"data": data, "seeds": arguments.seeds, "train": RECIPES[data], "tail": _TAIL}
            rows = {str(seed): found for seed, found in zip(arguments.seeds, seeds, strict=True)}
            name = "-".join(["distil", data, *arguments.beside])
            record = {"name": name, **circumstances(config), "seeds": rows, "spread": over_seeds(seeds)}
            write_json(RESULTS / f"{name}.json", record)


def _show(title: str, seeds: dict[int, dict[str, Numbers]]) -> None:
    columns = next(iter(next(iter(seeds.values())).values()))
    shown = Table("predictor", "seed", *(name.replace("_", " ") for name in columns), title=title)
    for seed, found in seeds.items():
        for name, row in found.items():
            cells = ("–" if value is None else f"{value:.3f}" for value in row.values())
            shown.add_row(name, str(seed), *cells)
    Console().print(shown)


if __name__ == "__main__":
    main()
