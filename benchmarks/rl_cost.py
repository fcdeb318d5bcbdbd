"""What the reward costs a step of RL: the reward model, the same backbone as a judge, and a judge over HTTP.

    python -m benchmarks.rl_cost --reward_model runs/demo/train/model      a quarter of an hour on two idle cores

`ppo` and `grpo` take a few updates on the embedded prompts, every rubric filled up to ten criteria, with each of three
rewards: `model`, the reward model; `local`, `LocalJudge`, one padded sequence a criterion; `http`, a System One server
on loopback (`transformers serve`), one call a rollout for all criteria. A judge is asked for every answer, as a
fallback without bounds; the reward model answers first, which adds its own time. Runs lie in runs/rl-cost, the record
in benchmarks/results/rl-cost.json; `share` is `reward_seconds` over `seconds` of a step (docs/metrics.md), medians
over all steps but the first.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.commands import options, run
from benchmarks.record import ROOT, spread, write_findings
from policy.run_folder import read_run
from rubric_data.io import load_data, write_judged
from rubric_data.records import Criterion, JudgedResponse, Rubric
from tests.rubric_data.served import Served

RUNS = ROOT / "runs" / "rl-cost"
CRITERIA = 10
STEPS = 4
OPTIONS = {
    "steps": STEPS,
    "batch_size": 16,
    "response_length": 48,
    "lora_layers": 10,
    "use_verifiers": "false",
    "gold_sample": 1,
    "gold_budget": 1,
    "eval_samples": 1,
    "eval_prompts": 2,
}
METHODS = {"ppo": {}, "grpo": {"group_size": 4}}
ASKED_ALWAYS = {"fallback_budget": 10**6, "fallback_width": 1e-9}


def filled_up(records: Sequence[JudgedResponse]) -> list[JudgedResponse]:
    """One record a prompt, its rubric filled up to `CRITERIA` with criteria of the prompts before it."""
    found: dict[str, JudgedResponse] = {}
    spare: list[Criterion] = []
    for record in records:
        if record.prompt_id in found:
            continue
        own = list(record.rubric.criteria)
        texts = {criterion.text for criterion in own}
        more = [one for one in reversed(spare) if one.text not in texts][: CRITERIA - len(own)]
        more = [one.model_copy(update={"id": f"more-{place}"}) for place, one in enumerate(more)]
        spare += own
        found[record.prompt_id] = record.model_copy(
            update={"rubric": Rubric(criteria=(*own, *more)[:CRITERIA]), "verdicts": ()}
        )
    return [record for record in found.values() if len(record.rubric.criteria) == CRITERIA]


@contextmanager
def judge_options(who: str) -> Iterator[dict[str, Any]]:
    """Options of a run that ``who`` rewards; a server is up meanwhile, if it takes one."""
    if who == "model":
        yield {"judge": "verifier"}
    elif who == "local":
        yield {"judge": "local", **ASKED_ALWAYS}
    else:
        server = Served(RUNS / "served.log")
        try:
            named = {"judge_model": server.model, "judge_base_url": f"{server.url}/v1"}
            yield {"judge": "systemone", **named, **ASKED_ALWAYS}
        finally:
            server.kill()


def measure(method: str, who: str, data: Path, reward_model: str) -> dict[str, Any]:
    """Seconds of a step and of its reward, and the share, over the steps but the first; a finished run is read."""
    folder = RUNS / f"{method}-{who}"
    if not (folder / "result.json").exists():  # or a judge would be started for nothing
        with judge_options(who) as judge:
            settings = {"reward_model": reward_model, "data": data, **OPTIONS, **METHODS[method], **judge}
            run(folder, method, *options(settings))
    rows = read_run(folder).rows[1:]
    return {
        "seconds": spread([row["seconds"] for row in rows]),
        "reward_seconds": spread([row["reward_seconds"] for row in rows]),
        "share": spread([row["reward_seconds"] / row["seconds"] for row in rows]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward_model", required=True, help="model folder")
    parser.add_argument("--who", nargs="+", choices=["model", "local", "http"], default=["model", "local", "http"])
    arguments = parser.parse_args()
    data = RUNS / "prompts.jsonl"
    write_judged(data, filled_up(load_data("builtin")))
    found = {
        f"{method}-{who}": measure(method, who, data, arguments.reward_model)
        for method in METHODS
        for who in arguments.who
    }
    config = {"criteria": CRITERIA, **OPTIONS}
    write_findings("rl-cost", config, {"steps": found})
    table = Table("step", "seconds", "of it the reward", "share")
    for name, row in found.items():
        table.add_row(name, *(f"{row[key]['median']:.3g}" for key in ("seconds", "reward_seconds", "share")))
    Console().print(table)


if __name__ == "__main__":
    main()
