"""The rubric workflow over HTTP: generate, three rounds of refinement, judge, train; ties and discrimination by round.

Two tables: the embedded model behind `transformers serve` as proposer and judge, whatever it achieves; and recorded
proposer replies (tests/golden/refinement.json), ranked by exact checks. Writes benchmarks/results/refinement.json.
Given again after a kill, it goes on where it was:

    python -m benchmarks.refinement --output runs/refinement      about an hour on two idle cores
"""

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.commands import run
from benchmarks.record import write_findings
from rm.refining import table
from rubric_data.io import load_data, write_judged, write_prompts
from rubric_data.records import JudgedResponse, PromptRecord
from tests.rubric_data import recorded
from tests.rubric_data.served import Served
from tests.rubric_data.server import Server

_PARTS = {"train": 0.6, "validation": 0.2, "test": 0.2}  # of the prompts


def embedded(prompts: int, responses: int) -> list[JudgedResponse]:
    """The first embedded prompts of each split, with their first ``responses`` by as many generators as there are."""
    by_prompt: dict[str, list[JudgedResponse]] = {}
    for record in load_data("builtin"):
        by_prompt.setdefault(record.prompt_id, []).append(record)
    chosen: list[JudgedResponse] = []
    for split, share in _PARTS.items():
        own = [records for records in by_prompt.values() if records[0].split == split]
        for records in own[: round(share * prompts)]:
            chosen += _in_turn(records)[:responses]
    return chosen


def _in_turn(records: Sequence[JudgedResponse]) -> list[JudgedResponse]:
    """``records`` with their generators taking turns."""
    turns: dict[str, int] = {}
    keyed = []
    for place, record in enumerate(records):
        turns[record.generator] = turns.get(record.generator, 0) + 1
        keyed.append((turns[record.generator], place, record))
    return [record for _, _, record in sorted(keyed, key=lambda item: item[:2])]


def with_embedded_model(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole workflow, every model call through HTTP; the reports by step."""
    pool = embedded(arguments.prompts, arguments.responses)
    data, prompts = str(folder / "pool.jsonl"), str(folder / "prompts.jsonl")
    write_judged(data, pool)
    shared = ("prompt_id", "prompt", "rubric", "split")
    different = {record.prompt_id: record for record in pool}
    write_prompts(prompts, [PromptRecord(**{k: getattr(r, k) for k in shared}) for r in different.values()])
    # a judge's name holds its address, so that going on needs the port of before
    server = Served(folder / "serve.log", "--continuous-batching", port=arguments.port)
    try:
        where = ["--base_url", f"{server.url}/v1", "--model", server.model]
        small = ["--timeout", "3000", "--concurrency", "8"]
        proposing = [*where, *small, "--max_tokens", str(arguments.max_tokens), "--max_failed", "1.0"]
        judging = ["--judge", "systemone", "--use_verifiers", "false", *where, *small]
        run(folder / "generate", "rubric", "generate", "--data", prompts, *proposing)
        refine = ["--data", data, "--rubrics", str(folder / "generate" / "prompts.jsonl")]
        refine += ["--rounds", "3", "--top", "1.0", "--tie", "0.01"]
        judge = [f"--judge.{word.removeprefix('--')}" if word.startswith("--") else word for word in judging]
        run(folder / "refine", "rubric", "refine", *refine, *proposing, *judge)
        refined = folder / "refine"
        final = ["--data", str(refined / "responses.jsonl"), "--ledger", str(refined / "ledger.sqlite")]
        run(folder / "judge", "judge", *final, *judging)
    finally:
        server.kill()
    steps = ["--max_steps", "4", "--eval_steps", "4", "--eval_trees", "4", "--tokens_per_batch", "1000"]
    data = str(folder / "judge" / "judged.jsonl")
    run(folder / "train", "train", "--data", data, *steps, "--lora_layers", "4")
    return {name: _report(folder / name) for name in ("generate", "refine", "judge")}


def with_recorded_replies(folder: Path) -> list[dict[str, Any]]:
    """The rows of three rounds with recorded proposer replies and exact checks."""
    data = str(folder / "recorded.jsonl")
    shutil.rmtree(folder / "recorded", ignore_errors=True)  # it takes seconds
    write_judged(data, recorded.records())
    server = Server([recorded.reply])
    try:
        options = ["--data", data, "--model", "recorded", "--checks", "true", "--base_url", server.url]
        run(folder / "recorded", "rubric", "refine", *options, "--top", "1.0", "--judge.judge", "verifier")
    finally:
        server.close()
    return _report(folder / "recorded")["rounds"]


def _report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/refinement"), help="folder for all runs")
    parser.add_argument("--prompts", type=int, default=40, help="embedded prompts")
    parser.add_argument("--responses", type=int, default=6, help="responses of each: three pairs")
    parser.add_argument("--max_tokens", type=int, default=160, help="longest reply of the embedded proposer")
    parser.add_argument("--port", type=int, default=8177, help="of the server on loopback")
    arguments = parser.parse_args()
    os.environ["NO_PROXY"] = "127.0.0.1"
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = with_recorded_replies(arguments.output)
    real = with_embedded_model(arguments.output, arguments)
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    write_findings("refinement", config, {"embedded_model": real, "recorded_replies": rows})
    console = Console()
    for title, shown in (("embedded model", real["refine"]["rounds"]), ("recorded replies", rows)):
        console.print(title)
        console.print(table(shown))


if __name__ == "__main__":
    main()
