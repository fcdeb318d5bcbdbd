"""Which metrics of a training tell recipes apart, and which are noise? `rubric-rm snr` on each data set.

    python -m benchmarks.signal_noise --data mrbench realsumm       what is done is not done again

For each data set, the embedded one among them, three small recipes (`benchmarks.distil`, or the demo's): ours, without
the pairwise loss, and with a head that starts at random; a checkpoint every `EVERY` steps. `snr` reads the last and the
first half of them on a part of the validation split (`READ`): what is recommended was not chosen on a test split.

Folders in runs/signal-noise, the record in benchmarks/results/signal-noise-<data>.json.
"""

import argparse
import json
import sys
from contextlib import nullcontext
from typing import Any

from benchmarks.commands import once, options
from benchmarks.distil import DATA, DATA_SETS, RECIPES, VARIANTS, cold_heads, kept, source
from benchmarks.record import ROOT, write_findings
from benchmarks.tail_matters import TRAIN, judged_data
from rubric_data.io import read_judged, write_judged

RUNS = ROOT / "runs" / "signal-noise"
EMBEDDED = "embedded"
NAMES = ("base", "no_pairs", "cold_head")
STEPS, EVERY = 24, 4
KEPT = {"max_steps": STEPS, "eval_steps": EVERY, "eval_trees": 4, "keep_checkpoints": 0, "patience": STEPS}
HALF = STEPS // EVERY // 2  # checkpoints
READ = (12, 6)  # validation prompts, and responses to each, that every checkpoint reads


def recipe(data: str) -> dict[str, Any]:
    """The settings of a training on ``data``."""
    return TRAIN if data == EMBEDDED else RECIPES[f"{data}-small"]


def panel(data: str, seed: int) -> dict[str, Any]:
    """The content of snr.json for one data set, its runs trained or gone on with."""
    folder, file = RUNS / data, RUNS / f"{data}.parquet"
    if not file.exists():
        whole = judged_data()[0] if data == EMBEDDED else source(data)
        write_judged(file, kept(read_judged(whole), {"validation": READ}))
    for name in NAMES:
        settings = {"data": file, "seed": seed, **recipe(data), **VARIANTS.get(name, {}), **KEPT}
        with cold_heads() if name == "cold_head" else nullcontext():
            once(folder / name, "train.json", "train", *options(settings))
    runs = f"--runs=[{', '.join(str(folder / name) for name in NAMES)}]"
    counts = {"last": HALF, "early": HALF, "average": 2}
    once(folder / "snr", "snr.json", "snr", runs, *options({"data": file, **counts}))
    return json.loads((folder / "snr" / "snr.json").read_text(encoding="utf-8"))


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Of a panel: its floor, what it recommends, and each metric's signal, noise, ratio and decision accuracy."""
    keys = ("signal", "noise", "snr")
    metrics = {
        name: {**{key: one[key]["value"] for key in keys}, "decision": one["decision"]["mean"]["value"]}
        for name, one in found["metrics"].items()
    }
    return {"noise_floor": found["noise_floor"], "recommendation": found["recommendation"], "metrics": metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=(EMBEDDED, *DATA_SETS), default=[EMBEDDED, *DATA_SETS])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not DATA.exists() and arguments.data != [EMBEDDED]:
        sys.exit(f"{DATA}: the judged responses are not there; --data {EMBEDDED} does without")
    for data in arguments.data:
        found = summary(panel(data, arguments.seed))
        config = {"data": data, "seed": arguments.seed, "recipes": NAMES, "read": READ, "train": recipe(data) | KEPT}
        write_findings(f"signal-noise-{data}", config, found)
        print(f"{data}: {found['recommendation']['text']}")


if __name__ == "__main__":
    main()
