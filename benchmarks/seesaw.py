"""Two families of rubrics, trained together, apart, and in stages: is gained on one what is lost on the other?

    python -m benchmarks.seesaw --reward_model runs/demo/train/model --seeds 0 1 2    what is done is not done again

The embedded prompts fall into two families: `form`, answers of a fixed form (lists, plans, summaries, e-mails), and
`free`, free text (stories, explanations, advice). Code pays for every criterion, so that what is seen comes from the
families and not from a reward model's error; `--reward_model` is loaded, as the commands want one, and not asked.

For each seed GRPO runs `together`, on both families for 2 `UPDATES`; `form` and `free`, on one for `UPDATES`, which is
as many rollouts of it as together; and by `rubric-rm curriculum` `form-free` and `free-form`, one after the other. Then
each policy answers the test prompts of both families, `SAMPLES` times, and gold is told apart by family.

Folders in runs/seesaw, the record in benchmarks/results/seesaw.json.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.commands import SMALL_GRPO, once, options
from benchmarks.record import ROOT, spread, write_findings
from benchmarks.tail_matters import judged_data
from rubric_data.files import write_json
from rubric_data.io import read_judged, write_judged
from rubric_data.records import JudgedResponse
from rubric_data.reward import rubric_reward

RUNS = ROOT / "runs" / "seesaw"
FAMILIES = {
    "form": ("list", "plan", "format", "rewrite", "summarise", "e-mail"),
    "free": ("story", "explain", "describe", "advise", "question", "compare"),
}
UPDATES = 12
SAMPLES = 4  # responses to each test prompt
GRPO = {**SMALL_GRPO, "eval_samples": 1}
POLICIES = ("start", "together", "form", "free", "form-free", "free-form")


def family(prompt_id: str) -> str | None:
    """Which family a prompt belongs to, by the end of its id; None: neither."""
    return next((name for name, kinds in FAMILIES.items() if prompt_id.endswith(tuple(f"-{k}" for k in kinds))), None)


def gold_by_family(records: Sequence[JudgedResponse]) -> dict[str, float]:
    """Mean gold reward of each family, over prompts and, within one, over its responses."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in FAMILIES}
    for record in records:
        name = family(record.prompt_id)
        if name is not None:
            found[name].setdefault(record.prompt_id, []).append(rubric_reward(record.rubric, record.values()))
    return {name: float(np.mean([np.mean(row) for row in rows.values()])) for name, rows in found.items()}


def prepare() -> dict[str, Path]:
    """Files of prompts with exact verdicts: of each family and of both."""
    files = {name: RUNS / f"{name}.jsonl" for name in (*FAMILIES, "both", "test")}
    if not files["test"].exists():
        records = [record for record in read_judged(judged_data()[0]) if family(record.prompt_id)]
        for name in FAMILIES:
            write_judged(files[name], [record for record in records if family(record.prompt_id) == name])
        write_judged(files["both"], records)
        write_judged(files["test"], [record for record in records if record.split == "test"])
    return files


def policy(seed: int, name: str, reward_model: Path) -> str:
    """The policy of one way of training, trained or gone on with."""
    files, folder = prepare(), RUNS / f"seed-{seed}" / name
    common = {"reward_model": str(reward_model), "seed": seed, **GRPO}
    if name == "start":
        return "smollm2"
    if "-" in name:
        first, second = name.split("-")
        stages = [{"name": one, "algorithm": "grpo", "data": str(files[one])} for one in (first, second)]
        recipe = {"policy": "smollm2", "stages": stages, "common": {**common, "steps": UPDATES}, "eval_prompts": 2}
        write_json(folder.with_suffix(".yaml"), recipe)  # JSON is YAML
        once(folder, f"2-{second}/result.json", "curriculum", "--config", folder.with_suffix(".yaml"))
        return str(folder / f"2-{second}" / "adapter")
    data, steps = (files["both"], 2 * UPDATES) if name == "together" else (files[name], UPDATES)
    once(folder, "result.json", "grpo", *options({"data": data, "steps": steps, "eval_prompts": 2, **common}))
    return str(folder / "adapter")


def measured(seed: int, name: str, reward_model: Path) -> dict[str, float]:
    """Gold by family of what the policy ``name`` answers to the test prompts."""
    answers = RUNS / f"seed-{seed}" / f"{name}-answers"
    settings = {"policy": policy(seed, name, reward_model), "reward_model": reward_model, "data": prepare()["test"]}
    settings |= {"samples": SAMPLES, "response_length": GRPO["response_length"], "seed": seed}
    once(answers, "report.json", "bon", *options(settings))
    return gold_by_family(read_judged(answers / "responses.jsonl"))


def over_seeds(seeds: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """By policy and family, spreads over seeds of gold, and of what it gained on the policy at the start."""
    return {
        name: {
            **{key: spread([one[name][key] for one in seeds]) for key in FAMILIES},
            **{f"{key}_gain": spread([one[name][key] - one["start"][key] for one in seeds]) for key in FAMILIES},
        }
        for name in POLICIES
    }


def show(spreads: dict[str, Any]) -> None:
    """The medians over seeds as a table, with the least and the most gain."""
    table = Table("policy", *FAMILIES, *(f"{name}: gain" for name in FAMILIES))
    for name, row in spreads.items():
        gains = (row[f"{key}_gain"] for key in FAMILIES)
        cells = [f"{row[key]['median']:.3f}" for key in FAMILIES]
        table.add_row(name, *cells, *(f"{one['median']:+.3f} [{one['min']:+.3f} {one['max']:+.3f}]" for one in gains))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward_model", type=Path, required=True, help="model folder of a training")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    found = {
        str(seed): {name: measured(seed, name, arguments.reward_model) for name in POLICIES} for seed in arguments.seeds
    }
    spreads = over_seeds(list(found.values()))
    config = {"seeds": arguments.seeds, "updates": UPDATES, "samples": SAMPLES, "grpo": GRPO}
    write_findings("seesaw", config, {"seeds": found, "spread": spreads})
    show(spreads)


if __name__ == "__main__":
    main()
