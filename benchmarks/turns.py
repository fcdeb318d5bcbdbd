"""How often does the forecast of an audit say that gold turns where it does not, and where it does? Simulated.

    python -m benchmarks.turns        a minute on one core

Proxy rewards are uniform, gold is a function of them with noise (standard deviation `NOISE`): `unrelated`, none at all;
`rises`, a tenth of the proxy; `falls`, as the proxy up to `TOP` of it and down from there. Of `DATA_SETS` data sets
each, by prompts and responses of one, how many get which outcome of `rm.forecast.section`. The record is
benchmarks/results/turns.json.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.record import write_findings
from rm import forecast, metrics

SHAPES = ((12, 12), (30, 12), (30, 25), (60, 25))  # prompts, responses to each
NOISE, TOP = 0.2, 0.8
DATA_SETS, RESAMPLES = 200, 200
OUTCOMES = ("turns", "rises", "unclear")
TRUTHS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "unrelated": lambda proxy: np.full_like(proxy, 0.5),
    "rises": lambda proxy: 0.1 * proxy,
    "falls": lambda proxy: np.where(proxy < TOP, proxy, 2 * TOP - proxy - 0.5),
}


def outcome(seed: int, prompts: int, responses: int, truth: Callable[[np.ndarray], np.ndarray]) -> str:
    """What is forecast of one data set."""
    generator = np.random.default_rng(seed)
    proxy_B = generator.random(prompts * responses)
    gold_B = truth(proxy_B) + generator.normal(0, NOISE, len(proxy_B))
    counts_RP = metrics.resample_counts(prompts, RESAMPLES, seed)
    prompt_B = np.repeat(np.arange(prompts), responses)

    def settle(statistic: metrics.Statistic) -> dict[str, float | None]:
        return {"value": None, "low": None, "high": None}  # the rows are not looked at

    return str(forecast.section(gold_B, proxy_B, prompt_B, counts_RP, settle)["turn"]["outcome"])


def main() -> None:
    cases = [(name, shape) for name in TRUTHS for shape in SHAPES]
    found: list[dict[str, Any]] = []
    for name, shape in track(cases, "simulating", console=Console(stderr=True), transient=True):
        counts = Counter(outcome(seed, *shape, TRUTHS[name]) for seed in range(DATA_SETS))
        shown = {one: counts[one] for one in OUTCOMES}
        found.append({"truth": name, "prompts": shape[0], "responses": shape[1], **shown})
    config = {"noise": NOISE, "top": TOP, "data_sets": DATA_SETS, "resamples": RESAMPLES}
    write_findings("turns", config, {"cases": found})
    table = Table("gold", "prompts × responses", *OUTCOMES)
    for row in found:
        table.add_row(row["truth"], f"{row['prompts']} × {row['responses']}", *(str(row[one]) for one in OUTCOMES))
    Console().print(table)


if __name__ == "__main__":
    main()
