"""Record a finished demo run and quote it in the README: `make demo`, then `python -m benchmarks.demo runs/demo-…`.

The record, benchmarks/results/demo.json, holds the run's summary with its commit, machine and versions.
"""

import argparse
import json
from pathlib import Path

from benchmarks.record import ROOT, quoted, write_findings
from rubric_data.files import ORIGIN_NAME, write_text


def tables(summary: str, commit: str) -> str:
    """The tables of a run's summary.md as the README quotes them."""
    body = summary.partition("\n")[2].replace("\n## ", "\n### ").strip()
    return f"A real run, as it came out (commit `{commit[:7]}`, `benchmarks/results/demo.json`). {body}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished demo run")
    folder = parser.parse_args().run
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    origin = json.loads((folder / ORIGIN_NAME).read_text(encoding="utf-8"))
    made = {key: origin[key] for key in ("commit", "dirty")}
    record = write_findings("demo", config, {"summary": summary}, origin=made)
    text = tables((folder / "summary.md").read_text(encoding="utf-8"), record["commit"])
    readme = ROOT / "README.md"
    write_text(readme, quoted(readme.read_text(encoding="utf-8"), "demo", text))


if __name__ == "__main__":
    main()
