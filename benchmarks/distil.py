"""Distil real verdicts and audit the models on prompts they have not seen: what is reached on each data set, by seed.

    python -m benchmarks.distil --data realsumm mrbench --seeds 0 1 2

Reads ../shared/data. One chain train -> calibrate -> audit for each data set and seed, in runs/distil/<data>-<seed>.
What is finished is not done again and a killed training goes on, so the command may be given at any time; the record,
benchmarks/results/distil-<data>.json, holds every seed that is finished. `--split validation` looks at the validation
split and writes no record: the test split is for the end.
"""

import argparse
import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.record import RESULTS, ROOT, circumstances, spread
from policy.cli import main as command_line
from rubric_data.files import write_json

DATA = ROOT.parent / "shared" / "data"
RUNS = ROOT / "runs" / "distil"
BASELINES = ("majority", "tag mean", "criterion mean", "length", "lexical overlap", "zero-shot")

_COMMON = {"tokens_per_batch": 4400, "lora_layers": 20, "learning_rate": 1.5e-3, "pairwise_weight": 0.1, "patience": 20}

# what a training costs is the tokens it reads; sized for about an hour on one thread
RECIPES: dict[str, dict[str, Any]] = {
    # the criteria ask about the summary alone: of the article, whatever room is left
    "realsumm": {"max_length": 320, "epochs": 1.5, "eval_steps": 57, "eval_trees": 20},
    "mrbench": {"max_length": 768, "epochs": 3.0, "eval_steps": 50, "eval_trees": 24},
    "structflow": {"max_length": 1024, "responses_per_tree": 4, "max_steps": 250, "eval_steps": 50, "eval_trees": 40},
    "hellobench": {"max_length": 1024, "responses_per_tree": 4, "max_steps": 250, "eval_steps": 50, "eval_trees": 24},
}


def chain(data: str, seed: int, split: str) -> dict[str, Any]:
    """Train, calibrate and audit what of it is not done yet; the audit. Ends the process if a command fails."""
    source, folder = str(DATA / f"{data}.parquet"), RUNS / f"{data}-{seed}"
    model, audit = folder / "model", RUNS / f"{data}-{seed}-{split}"
    if not (folder / "train.json").exists():
        resume = ["--resume", "true"] if folder.exists() else []
        _run("train", "--output", folder, "--data", source, "--seed", seed, *options(_COMMON | RECIPES[data]), *resume)
    if not (model / "calibration.json").exists():
        _run("calibrate", "--model", model, "--data", source)
    if not (audit / "audit.json").exists():
        _run("audit", "--model", model, "--data", source, "--output", audit, "--split", split)
    return json.loads((audit / "audit.json").read_text(encoding="utf-8"))


def options(settings: dict[str, Any]) -> list[str]:
    """``settings`` as words of a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def numbers(audit: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """By predictor: AUROC, Brier score and ECE of verdicts, pair accuracy overall and in the tail (ties count half)."""
    return {
        name: {key: one["criterion"][key]["value"] for key in ("auroc", "accuracy", "brier", "ece")}
        | {"pair_accuracy": one["reward"]["pair_accuracy"]["half"]["value"]}
        | {"tail_pair_accuracy": one["reward"]["tail_pair_accuracy"]["half"]["value"]}
        for name, one in audit["predictors"].items()
    }


def _spread(values: list[float | None]) -> dict[str, float | int] | None:
    known = [value for value in values if value is not None]
    return spread(known) if len(known) == len(values) else None


def _run(*words: Any) -> None:
    code = command_line([str(word) for word in words])
    if code:
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(RECIPES), default=["realsumm", "mrbench"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    arguments = parser.parse_args()
    if not DATA.exists():
        sys.exit(f"{DATA}: the judged responses are not there; see the README's benchmarks")
    for data in arguments.data:
        audits = {seed: chain(data, seed, arguments.split) for seed in arguments.seeds}
        seeds = {seed: numbers(audit) for seed, audit in audits.items()}
        if arguments.split == "test":
            config = {"data": data, "seeds": arguments.seeds, **_COMMON, **RECIPES[data]}
            rows = {str(seed): found for seed, found in seeds.items()}
            over_seeds = {
                name: {key: _spread([found[name][key] for found in seeds.values()]) for key in row}
                for name, row in next(iter(seeds.values())).items()
            }
            record = {"name": f"distil-{data}", **circumstances(config), "seeds": rows, "over_seeds": over_seeds}
            write_json(RESULTS / f"distil-{data}.json", record)
        _show(data, arguments.split, seeds)


def _show(data: str, split: str, seeds: dict[int, dict[str, dict[str, float | None]]]) -> None:
    shown = Table("predictor", *next(iter(next(iter(seeds.values())).values())), title=f"{data}, {split}")
    for seed, found in seeds.items():
        for name, row in found.items():
            shown.add_row(f"{name}, {seed}", *("–" if value is None else f"{value:.3f}" for value in row.values()))
    Console().print(shown)


if __name__ == "__main__":
    main()
