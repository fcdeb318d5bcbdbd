"""Distil real verdicts and audit the models on prompts they have not seen: what is reached on each data set, by seed.

    python -m benchmarks.distil --data realsumm mrbench --seeds 0 1 2                        the validation split
    python -m benchmarks.distil --data realsumm --seeds 0 --beside tail bt --split test
    python -m benchmarks.distil --data mrbench-small --seeds 0 1 2 --beside tail blind no_pairs cold_head bt any2jev
    python -m benchmarks.distil --data mrbench-half mrbench-rest --seeds 0 1 2               on unseen generators
    python -m benchmarks.distil --data realsumm-small mrbench-small --beside all             one model for all four

Reads ../shared/data. For each data set and seed: train, calibrate, audit, in runs/distil/<data>-<seed>; `--beside`
puts the same with a tail stage or with a part changed (`VARIANTS`), the peers of `benchmarks.peers`, and one model
trained on all data sets into the same table. <data>-small takes `_SMALL` steps and fewer prompts held out, where parts
are compared over seeds, and leaves out the model before its training. Of <data>-half, small too, training reads half
the generators, of <data>-rest the others, so that between them each generator is once seen and once unseen. What is
finished is not done again and a killed training goes on, so the command may be given at any time. With `--split test`,
which is for the end, the record benchmarks/results/distil-<data>-<beside>.json is written.
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

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.commands import calibrate, call, once, options
from benchmarks.record import ROOT, spread, write_findings
from rm import metrics
from rm.model import RubricRewardModel
from rm.sides import number_texts
from rubric_data.grading import give_levels
from rubric_data.io import read_judged, write_judged
from rubric_data.records import JudgedResponse, Split, content_hash
from rubric_data.reward import rubric_reward

DATA = ROOT.parent / "shared" / "data"
RUNS = ROOT / "runs" / "distil"
# ours with one part changed: it reads no rubric; learns no pairs; its head does not start as the model's own Yes or No
VARIANTS: dict[str, dict[str, Any]] = {
    "blind": {"rubric_blind": "true"},
    "no_pairs": {"pairwise_weight": 0},
    "cold_head": {},
}
PEERS = ("bt", "any2jev")
BESIDE = ("tail", *VARIANTS, "all", *PEERS)

_COMMON = {"tokens_per_batch": 4400, "lora_layers": 20, "learning_rate": 1.5e-3, "pairwise_weight": 0.1, "patience": 20}
# a training costs what it reads: .6 to 1 million tokens, twenty minutes to half an hour on one thread
RECIPES: dict[str, dict[str, Any]] = {
    # the criteria ask about the summary alone: of the article, whatever room is left
    "realsumm": _COMMON | {"max_length": 320, "epochs": 1.5, "eval_steps": 57, "eval_trees": 20},
    "mrbench": _COMMON | {"max_length": 768, "epochs": 3.0, "eval_steps": 50, "eval_trees": 24},
    "structflow": _COMMON | {"max_length": 1024, "responses_per_tree": 6, "eval_steps": 50, "eval_trees": 16},
    "hellobench": _COMMON | {"max_length": 768, "responses_per_tree": 4, "eval_steps": 50, "eval_trees": 16},
}
DATA_SETS = tuple(RECIPES)
GRADED = {"hellobench": ("0", "0.25", "0.5", "0.75", "1")}  # the scale that the judge of a data set was given
_SMALL = 40  # steps
# order comes late otherwise (LOG 28); in long trainings it costs verdicts (LOG 33)
_SHORT = {"pairwise_weight": 1.0}
RECIPES |= {
    f"{data}-{part}": RECIPES[data] | _SHORT | {"max_steps": _SMALL, "eval_steps": _SMALL // 2}
    for data in DATA_SETS
    for part in ("small", "half", "rest")
}
_ALL = _COMMON | {
    **_SHORT,
    "max_length": 768,
    "responses_per_tree": 4,
    "max_steps": _SMALL * len(DATA_SETS),
    "eval_steps": _SMALL,
    "eval_trees": 40,
}
# so many prompts of a split with so many responses each; all of a split that is not named. Where responses are long,
# less is held out, since an audit reads all, several times, and training reads each prompt's best and worst
Cut = dict[Split, tuple[int, int]]
_CUT: dict[str, Cut] = {
    "structflow": {"train": (1000, 6), "validation": (20, 12), "test": (40, 12)},
    "hellobench": {"train": (1000, 4), "validation": (16, 12), "test": (30, 12)},
}
_SMALL_CUT: Cut = {"validation": (12, 12), "test": (30, 12)}
# what one model for all reads of each, about `_SMALL` steps' worth
_SHARES = {"realsumm": (40, 8), "mrbench": (100, 12), "structflow": (80, 4), "hellobench": (60, 4)}
_TAIL = {"tokens_per_batch": 4400, "learning_rate": 3e-4, "epochs": 1.0, "eval_steps": 10}

FULL = 0.99  # a verdict above it says that the criterion is met in full
BOOTSTRAP = 1000

_VERDICTS, _PAIRS = ("auroc", "concordance", "accuracy", "brier", "ece"), ("pair_accuracy", "tail_pair_accuracy")
Row = dict[str, dict[str, float] | None]  # by statistic its value, low and high; None: there is none


def chain(data: str, seed: int, split: str, beside: Sequence[str]) -> Path:
    """What of one data set and seed is not done yet; the folder of the audit. Ends the process if a command fails."""
    file, folder = source(data), RUNS / f"{data}-{seed}"
    ours = _trained(folder / "train", "train", file, {"seed": seed, **RECIPES[data]})
    others: dict[str, Path] = {}
    if "tail" in beside:
        settings = {"seed": seed, "model": ours, **_TAIL}
        others["tail"] = _trained(folder / "tail", "tail", file, settings)
    for name in (name for name in VARIANTS if name in beside):
        with cold_heads() if name == "cold_head" else nullcontext():
            settings = {"seed": seed} | RECIPES[data] | VARIANTS[name]
            others[name] = _trained(folder / name, "train", file, settings)
    if "all" in beside:
        others["all"] = _trained(RUNS / f"all-{seed}" / "train", "train", _source_of_all(), {"seed": seed, **_ALL})
    for peer in (peer for peer in PEERS if peer in beside):
        others[peer] = folder / f"{peer}.jsonl"
        words = ["--peer", peer, "--run", folder / "train", "--output", others[peer]]
        command = [sys.executable, "-m", "benchmarks.peers", *words, "--splits", "validation", "test"]
        subprocess.run([str(word) for word in command], check=True)  # a finished peer is not trained again
    audit = folder / "-".join(["audit", split, *others])
    if not (audit / "audit.json").exists():
        named = [f"--others=[{', '.join(f'{name}={path}' for name, path in others.items())}]"] if others else []
        asked = options({"model": ours, "data": file, "output": audit, "split": split})
        call("audit", *asked, "--zero_shot", str("-" not in data).lower(), *named)
    return audit


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


def source(data: str) -> Path:
    """The file of ``data`` with what `_CUT` leaves of it, which is what comes first by a hash; `GRADED` as levels."""
    name, _, part = data.partition("-")
    cut = {**_CUT.get(name, {}), **(_SMALL_CUT if part else {})}
    if not cut and name not in GRADED:
        return DATA / f"{name}.parquet"
    path = RUNS / f"{data}.parquet"
    if not path.exists():
        records = kept(judged(name), cut)
        write_judged(path, records if part in ("", "small") else _of_half(records, part == "half"))
    return path


def _source_of_all() -> Path:
    """The file of all data sets in their `_SHARES`."""
    path = RUNS / "all.parquet"
    if not path.exists():
        cuts = {data: {**_SMALL_CUT, "train": share} for data, share in _SHARES.items()}
        records = [record for data, cut in cuts.items() for record in kept(judged(data), cut)]
        write_judged(path, records)
    return path


def judged(name: str) -> list[JudgedResponse]:
    """The data set, its criteria with the levels that they were judged on."""
    records = read_judged(DATA / f"{name}.parquet")
    return give_levels(records, GRADED[name])[0] if name in GRADED else records


def kept(records: Sequence[JudgedResponse], cut: Cut) -> list[JudgedResponse]:
    """The prompts and responses of each split that ``cut`` leaves; of a split that it does not name, all.

    They come first by a hash; of training responses half are the judge's best and half its worst, whose verdicts tell
    more (it ties most of the others). What that does to base rates calibration undoes, on the validation split.
    """
    kept = [record for record in records if record.split not in cut]
    ordered = sorted(records, key=lambda record: content_hash(record.response_id))
    for split, (prompts, responses) in cut.items():
        found: dict[str, list[JudgedResponse]] = {}
        for record in ordered:
            if record.split == split:
                found.setdefault(record.prompt_id, []).append(record)
        for name in sorted(found, key=content_hash)[:prompts]:
            kept += _extremes(found[name], responses) if split == "train" else found[name][:responses]
    return kept


def _extremes(records: Sequence[JudgedResponse], count: int) -> list[JudgedResponse]:
    """As many of the lowest as of the highest rewards, those without one in the middle; all if there are no more."""
    rewards = [rubric_reward(record.rubric, record.values()) for record in records]
    middle = float(np.nanmean(rewards)) if not np.isnan(rewards).all() else 0.0
    order = np.argsort(np.nan_to_num(rewards, nan=middle), kind="stable")
    low = count // 2
    kept = order if len(order) <= count else np.concatenate([order[:low], order[len(order) - (count - low) :]])
    return [records[place] for place in kept]


def _of_half(records: Sequence[JudgedResponse], first: bool) -> list[JudgedResponse]:
    """All of the test split; of the others, what the first or second half of the generators, by a hash, wrote."""
    generators = sorted({record.generator for record in records}, key=content_hash)
    middle = len(generators) // 2
    known = generators[:middle] if first else generators[middle:]
    return [record for record in records if record.split == "test" or record.generator in known]


def _trained(folder: Path, command: str, data: Path, settings: dict[str, Any]) -> Path:
    """The calibrated model of one training, done or gone on with if need be."""
    model = folder / "model"
    once(folder, f"{command}.json", command, "--data", data, *options(settings))
    calibrate(model, data)
    return model


def numbers(audit: dict[str, Any]) -> dict[str, Row]:
    """By predictor: agreement on verdicts, pair accuracy overall and in the tail with ties as half; None: has none.

    The model is there once more on seen and on unseen generators, without pairs, if the audit knows of both.
    """
    found = {
        name: _row(one["criterion"] or {}, {key: one["reward"][key]["half"] for key in _PAIRS})
        for name, one in audit["predictors"].items()
    }
    slices = audit["by_novelty"]["generator"]
    for name, one in slices.items() if len(slices) > 1 else ():
        found[f"model, {name} generators"] = _row(one, {})
    return found


def leads(audit: dict[str, Any]) -> dict[str, Row]:
    """By predictor: how much more the model has of each of `numbers`, paired by prompt."""
    return {name: _row(one, one) for name, one in audit["model_minus"].items()}


def met_in_full(audit: Path) -> dict[str, Any]:
    """AUROC of whether a verdict is above `FULL` instead of a half, by predictor, and the model's lead over each.

    Of graded verdicts nearly all may be above a half: what tells them apart is whether a criterion is met in full.
    ``audit`` is the folder of one.
    """
    lines = (audit / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["gold"] is not None]
    full_N = np.array([row["gold"] > FULL for row in rows], float)
    prompt_N = number_texts(row["prompt_id"] for row in rows)
    prompts = int(prompt_N.max()) + 1
    counts_RP = metrics.resample_counts(prompts, BOOTSTRAP, 0)
    found = {
        name: metrics.auroc(full_N, np.array([row["predicted"][name] for row in rows], float), prompt_N, prompts)
        for name in rows[0]["predicted"]
    }
    lead = {
        name: metrics.difference(found["model"], one, counts_RP).as_dict()
        for name, one in found.items()
        if name != "model"
    }
    auroc = {name: metrics.estimate(one, counts_RP).as_dict() for name, one in found.items()}
    return {"above": FULL, "share": float(full_N.mean()), "auroc": auroc, "model_minus": lead}


def _row(verdicts: dict[str, Any], pairs: dict[str, Any]) -> Row:
    row = {key: verdicts.get(key) for key in _VERDICTS} | {key: pairs.get(key) for key in _PAIRS}
    return {key: None if one is None or one["value"] is None else one for key, one in row.items()}


def curve(run: Path) -> list[dict[str, float]]:
    """What a training measured on a part of the validation split on its way, by step."""
    log = json.loads((run / "train.json").read_text(encoding="utf-8"))["log"]
    names = {"eval_auroc": "auroc", "eval_pair_accuracy": "pair_accuracy", "eval_loss": "loss"}
    return [
        {"step": entry["step"]} | {short: round(entry[name], 4) for name, short in names.items()}
        for entry in log
        if names.keys() <= entry.keys()
    ]


def over_seeds(seeds: Sequence[dict[str, Row]]) -> dict[str, dict[str, Any]]:
    """The spread of each value over seeds; None where a predictor has no such number."""
    found: dict[str, dict[str, Any]] = {}
    for name, row in seeds[0].items():
        values = {key: [one[name][key] for one in seeds] for key in row}
        found[name] = {
            key: None if None in some else spread([one["value"] for one in some if one is not None])
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
        folders = {seed: chain(data, seed, arguments.split, arguments.beside) for seed in arguments.seeds}
        audits = {
            seed: json.loads((folder / "audit.json").read_text(encoding="utf-8")) for seed, folder in folders.items()
        }
        _show(f"{data}, {arguments.split}", {seed: numbers(audit) for seed, audit in audits.items()})
        if arguments.split == "test":
            config = {"data": data, "seeds": arguments.seeds, "train": RECIPES[data], "tail": _TAIL}
            name = "-".join(["distil", data, *arguments.beside])
            found = findings(data, audits)
            for seed, folder in folders.items():
                found["seeds"][str(seed)]["met_in_full"] = met_in_full(folder)
            write_findings(name, config, found)


def findings(data: str, audits: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """What the record says of the ``audits`` by seed: of each the numbers, leads and learning curve; spreads."""
    seeds: dict[str, dict[str, Any]] = {
        str(seed): {
            "numbers": numbers(audit),
            "model_minus": leads(audit),
            "curve": curve(RUNS / f"{data}-{seed}" / "train"),
        }
        for seed, audit in audits.items()
    }
    parts = {"spread": "numbers", "spread_of_leads": "model_minus"}
    return {"seeds": seeds} | {name: over_seeds([one[part] for one in seeds.values()]) for name, part in parts.items()}


def _show(title: str, seeds: dict[int, dict[str, Row]]) -> None:
    columns = next(iter(next(iter(seeds.values())).values()))
    shown = Table("predictor", "seed", *(name.replace("_", " ") for name in columns), title=title)
    for seed, found in seeds.items():
        for name, row in found.items():
            cells = ("–" if one is None else f"{one['value']:.3f}" for one in row.values())
            shown.add_row(name, str(seed), *cells)
    Console().print(shown)


if __name__ == "__main__":
    main()
