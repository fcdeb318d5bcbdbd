"""Does a reward that is right in the tail let a policy go further? Gold against KL, by best-of-n and by GRPO.

    python -m benchmarks.tail_matters --seeds 0 1 2                 best-of-n, then GRPO; what is done is not done again
    python -m benchmarks.tail_matters --seeds 0 --parts best_of_n

Five rewards on the embedded data, where gold is exact: `base`, distilled from all training responses; `tail`, the same
with the tail stage; `off_policy`, distilled from the written and edited responses alone, the policy's own left out;
`bt`, a Bradley-Terry scalar on the terms of `base`; `gold`, the verifiers themselves. All have the backbone, the
prompts and, but for the tail stage, the number of steps in common.

best_of_n: on one pool of 256 samples of the starting policy to each of 8 test prompts, gold of the best of n by each
reward. Before, the forecast is made from the first 32 samples of each. grpo: a run on the training prompts for each
reward but `bt`, which answers no criteria; every rollout is judged, so that the log of a run is gold against KL.

Folders in runs/tail-matters, the record in benchmarks/results/tail-matters.json.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import peers
from benchmarks.commands import SMALL_GRPO, calibrate, call, once, options
from benchmarks.record import ROOT, running_mean, spread, write_findings
from policy.run_folder import read_run
from rm import forecast, metrics
from rm.scores import read_any_scores
from rm.sides import number_texts
from rubric_data.io import read_judged, write_judged
from rubric_data.records import JudgedResponse
from rubric_data.reward import rubric_reward

RUNS = ROOT / "runs" / "tail-matters"
POOL = {"prompts": 8, "samples": 256, "response_length": 48}
FORECAST_SAMPLES = 32  # of a prompt, those that the forecast is made from
BOOTSTRAP = 1000
TRAIN = {  # of configs/quickstart.yaml
    "max_steps": 200,
    "tokens_per_batch": 2000,
    "responses_per_tree": 3,
    "drills": 6,
    "pairwise_weight": 0.1,
    "learning_rate": 2e-3,
    "lora_layers": 20,
    "eval_steps": 50,
}
SHORT = TRAIN | {"max_steps": 100}  # three rewards for each of three seeds: sizes are cut before seeds
TAIL = {"tokens_per_batch": 2000, "drills": 6, "eval_steps": 20}
GRPO = {"steps": 20, **SMALL_GRPO, "eval_samples": 3, "save_steps": 5}
MODELS = ("base", "tail", "off_policy")  # rewards that are model folders
SMOOTH = 5  # updates of a GRPO log that are averaged before it is read
BUDGETS = (0.5, 1.0, 2.0, 4.0, 8.0)  # KL at which a GRPO log is read, in nats a response

Curve = list[dict[str, Any]]


def judged_data() -> tuple[Path, Path]:
    """The embedded data with exact verdicts; the same with none of the policy's own responses to train on."""
    once(RUNS / "judge", "report.json", "judge", "--judge", "verifier")
    whole, others = RUNS / "judge" / "judged.jsonl", RUNS / "off-policy.jsonl"
    if not others.exists():
        records = read_judged(whole)
        write_judged(others, [one for one in records if one.split != "train" or one.generator.startswith("edit:")])
    return whole, others


def train_rewards(seed: int) -> dict[str, Path]:
    """The model folders of one seed by name, trained and calibrated."""
    whole, others = judged_data()
    folder = RUNS / f"seed-{seed}"
    models = {name: folder / name / "model" for name in MODELS}
    for name, data in (("base", whole), ("off_policy", others)):
        once(folder / name, "train.json", "train", "--data", data, "--seed", seed, *options(SHORT))
        calibrate(models[name], whole)
    settings = options({"model": models["base"], "data": whole, "seed": seed, **TAIL})
    once(folder / "tail", "tail.json", "tail", *settings)
    calibrate(models["tail"], whole)
    return models


# --- best-of-n -------------------------------------------------------------------------------------------------------


def pool(model: Path) -> Path:
    """The file of the pool's responses with their gold verdicts; ``model`` scores them on the way."""
    prompts, folder = RUNS / "pool.jsonl", RUNS / "pool"
    if not prompts.exists():
        held_out = [record for record in read_judged(judged_data()[0]) if record.split == "test"]
        first = list(dict.fromkeys(record.prompt_id for record in held_out))[: POOL["prompts"]]
        write_judged(prompts, [record for record in held_out if record.prompt_id in first])
    settings = {"reward_model": model, "data": prompts, "policy": "smollm2", "use_verifiers": "false"}
    sampling = {name: POOL[name] for name in ("samples", "response_length")}
    once(folder, "report.json", "bon", *options(settings | sampling))
    return folder / "responses.jsonl"


def pool_rewards(
    seed: int, models: dict[str, Path], responses: Path, records: Sequence[JudgedResponse]
) -> dict[str, np.ndarray]:
    """What each reward gives the ``records`` of the pool's file ``responses``, (B,) each."""
    gold_B = np.array([rubric_reward(record.rubric, record.values()) for record in records])
    found = {"gold": gold_B}
    for name, model in models.items():
        scores = RUNS / f"seed-{seed}" / f"pool-{name}.jsonl"
        if not scores.exists():
            settings = {"model": model, "data": responses, "output": scores, "use_verifiers": "false"}
            call("score", *options(settings))
        answers = read_any_scores(scores, records)
        found[name] = np.array([rubric_reward(one.rubric, own) for one, own in zip(records, answers, strict=True)])
    bt = RUNS / f"seed-{seed}" / "bt.jsonl"
    peers.run("bt", peers.Terms.of(RUNS / f"seed-{seed}" / "base"), [], bt, responses)
    found["bt"] = np.asarray(read_any_scores(bt, records), float)
    return found


def best_of_n(records: Sequence[JudgedResponse], rewards: dict[str, np.ndarray]) -> dict[str, Any]:
    """By reward: gold and KL of the best of n for n = 1, 2, 4 ..., and the forecast from the first samples."""
    prompt_B = number_texts(record.prompt for record in records)
    prompts = int(prompt_B.max()) + 1
    counts_RP = metrics.resample_counts(prompts, BOOTSTRAP, 0)
    first_B = _first(prompt_B, FORECAST_SAMPLES)

    def settle(statistic: metrics.Statistic) -> dict[str, float | None]:
        return metrics.estimate(statistic, counts_RP).as_dict()

    gold_B, few_B = rewards["gold"], prompt_B[first_B]
    found = {}
    for name, reward_B in rewards.items():
        curve = forecast.best_of_n_section(gold_B, reward_B, prompt_B, prompts, settle)
        before = forecast.section(gold_B[first_B], reward_B[first_B], few_B, counts_RP, settle)
        found[name] = {"curve": curve["rows"], "forecast": before["turn"]}
    return found


def _first(prompt_B: np.ndarray, samples: int) -> np.ndarray:
    """Which responses are among the first ``samples`` of their prompt, (B,) bool."""
    seen: dict[int, int] = {}
    first = []
    for prompt in prompt_B.tolist():
        seen[prompt] = seen.get(prompt, 0) + 1
        first.append(seen[prompt] <= samples)
    return np.array(first)


# --- GRPO ------------------------------------------------------------------------------------------------------------


def grpo(seed: int, models: dict[str, Path], name: str) -> dict[str, Any]:
    """The log of a run paid by ``name``, read by `read_log`, and what the policy earned on the test prompts."""
    folder = RUNS / f"seed-{seed}" / f"grpo-{name}"
    settings = {
        "reward_model": models.get(name, models["base"]),
        "data": judged_data()[0],
        "seed": seed,
        "use_verifiers": str(name == "gold").lower(),  # every embedded criterion has one
        **GRPO,
    }
    once(folder, "result.json", "grpo", *options(settings))
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    held_out = {key: result[key] for key in ("gold_before", "gold_after", "gold_gain", "proxy_gain", "kl_final")}
    criteria = result["criteria"] / (result["prompts_trained"] + result["prompts_evaluated"])  # of a response
    return {**read_log(read_run(folder).rows), "held_out": held_out, "criteria": round(criteria, 3)}


def read_log(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Gold and proxy against KL over a run: means over `SMOOTH` updates, where gold is highest, and at `BUDGETS`.

    Budgets are read off at the first mean whose KL is there, None where the run did not get as far.
    """
    width = min(SMOOTH, len(rows))
    kl, gold, proxy = (running_mean([row[key] for row in rows], width) for key in ("kl", "reward/gold", "reward/proxy"))
    peak = int(gold.argmax())
    at: dict[str, float | None] = {}
    for budget in BUDGETS:
        reached = np.flatnonzero(kl >= budget)
        at[str(budget)] = round(float(gold[reached[0]]), 4) if len(reached) else None
    curve = [
        {"kl": round(float(x), 4), "gold": round(float(y), 4), "proxy": round(float(z), 4)}
        for x, y, z in zip(kl, gold, proxy, strict=True)
    ]
    return {"curve": curve, "smooth": width, "peak": curve[peak], "last": curve[-1], "gold_at_kl": at}


def _verdicts(seed: int, name: str) -> int:
    """How many verdicts the model ``name`` was trained on; the tail stage reads the same ones as its base."""
    report = RUNS / f"seed-{seed}" / ("base" if name == "tail" else name) / "train.json"
    return int(json.loads(report.read_text(encoding="utf-8"))["train_verdicts"])


def judge_calls(log: dict[str, Any], by_judge: dict[str, Any], distilled: int) -> dict[str, float | None]:
    """Verdicts of a judge at equal gold: asked in each step of the run ``by_judge``, or ``distilled`` once.

    ``in_the_loop`` is what ``by_judge`` had asked when it first earned the highest gold of ``log`` (None: it never
    did); ``runs_to_repay`` how many such runs ask as much as the distillation did.
    """
    goal = log["peak"]["gold"]
    reached = next((place for place, point in enumerate(by_judge["curve"]) if point["gold"] >= goal), None)
    if reached is None:
        return {"in_the_loop": None, "distilled": distilled, "runs_to_repay": None}
    updates = reached + by_judge["smooth"]
    asked = updates * GRPO["batch_size"] * by_judge["criteria"]
    return {"in_the_loop": round(asked), "distilled": distilled, "runs_to_repay": round(distilled / asked, 2)}


# --- the record ------------------------------------------------------------------------------------------------------


def best_row(curve: Curve) -> dict[str, float]:
    """Of a best-of-n curve, where gold is highest."""
    best = max(curve, key=lambda row: row["gold"]["value"])
    return {"n": best["n"], "gold": best["gold"]["value"], "kl": best["kl"]["value"]}


def over_seeds(seeds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """By reward, spreads over seeds: gold of the best of the largest n, its highest, and the same of GRPO."""
    found: dict[str, Any] = {}
    parts = list(seeds.values())
    for name in parts[0]["best_of_n"]:
        curves = [part["best_of_n"][name]["curve"] for part in parts]
        peaks = [best_row(curve) for curve in curves]
        row = {
            "best_of_n": {
                "gold_at_largest_n": spread([curve[-1]["gold"]["value"] for curve in curves]),
                "highest_gold": spread([peak["gold"] for peak in peaks]),
                "n_of_highest_gold": spread([peak["n"] for peak in peaks]),
            }
        }
        logs = [part["grpo"][name] for part in parts if name in part.get("grpo", {})]
        if logs:
            row["grpo"] = {
                "highest_gold": spread([log["peak"]["gold"] for log in logs]),
                "kl_of_highest_gold": spread([log["peak"]["kl"] for log in logs]),
                "last_gold": spread([log["last"]["gold"] for log in logs]),
                "last_kl": spread([log["last"]["kl"] for log in logs]),
                "held_out_gold_gain": spread([log["held_out"]["gold_gain"]["value"] for log in logs]),
            }
        found[name] = row
    return found


def show(spreads: dict[str, Any]) -> None:
    """The medians over seeds as a table."""
    keys = [(part, key) for part, row in next(iter(spreads.values())).items() for key in row]
    keys += [("grpo", key) for key in spreads["base"].get("grpo", {}) if ("grpo", key) not in keys]
    table = Table("reward", *(f"{part}: {key}".replace("_", " ") for part, key in keys))
    for name, row in spreads.items():
        cells = (row.get(part, {}).get(key) for part, key in keys)
        table.add_row(name, *("–" if cell is None else f"{cell['median']:.3f}" for cell in cells))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=["best_of_n", "grpo"], default=["best_of_n", "grpo"])
    arguments = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    responses = pool(train_rewards(arguments.seeds[0])["base"])
    records = read_judged(responses)
    for seed in arguments.seeds:
        models = train_rewards(seed)
        found[str(seed)] = {"best_of_n": best_of_n(records, pool_rewards(seed, models, responses, records))}
        if "grpo" in arguments.parts:
            logs = {name: grpo(seed, models, name) for name in (*MODELS, "gold")}
            found[str(seed)]["grpo"] = logs
            found[str(seed)]["judge_calls"] = {
                name: judge_calls(logs[name], logs["gold"], _verdicts(seed, name)) for name in MODELS
            }
    spreads = over_seeds(found)
    config = {"seeds": arguments.seeds, "pool": POOL, "train": SHORT, "tail": TAIL, "grpo": GRPO}
    write_findings("tail-matters", config, {"seeds": found, "spread": spreads})
    show(spreads)


if __name__ == "__main__":
    main()
