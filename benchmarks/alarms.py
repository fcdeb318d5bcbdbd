"""How often does the watch of an RL run raise a false alarm, and how often does it find a fall of gold? Simulated.

    python -m benchmarks.alarms        a few minutes on one core

A run is so many looks of `policy.watch.Trend`; at each, so many prompts have so many rollouts, all or half of which
are judged. Gold is 0 or 1 (`binary`), the hardest case, as some looks see ones alone; or the mean of ten such criteria
(`mean of ten`). The proxy goes along with gold, with noise. Flat runs should raise an alarm in one of twenty at most
(`policy.watch.ERROR`); in the others gold falls halfway through. The record is benchmarks/results/alarms.json, the
table of docs/watch.md is from it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.record import write_findings
from policy.watch import Slope, Trend, draw, estimate_gold, inclusion

DESIGNS = ((4, 4, 1.0), (8, 2, 1.0), (16, 1, 1.0), (32, 1, 0.5))  # prompts, rollouts of each, share judged
LOOKS = (14, 50, 100)
CRITERIA = {"binary": 1, "mean of ten": 10}
FLAT = (0.5, 0.8, 0.95)
FALLS = ((0.8, 0.2), (0.8, 0.5), (0.6, 0.4))
FLAT_RUNS, FALLING_RUNS = 100, 40
SEED = 0


def alarm(
    generator: np.random.Generator, means: Sequence[float], prompts: int, each: int, share: float, criteria: int
) -> int | None:
    """The look, counted from 1, at which a run with these ``means`` of gold raises an alarm; None if it never does."""
    trend, slope = Trend(len(means)), Slope()
    prompt_N = np.repeat(np.arange(prompts), each)
    for number, mean in enumerate(means, 1):
        gold_N = generator.binomial(criteria, mean, len(prompt_N)) / criteria
        proxy_N = 0.3 + 0.6 * gold_N + generator.normal(0, 0.2, len(prompt_N))
        chance_N = inclusion(round(share * len(prompt_N)), proxy_N, np.full(len(prompt_N), np.nan))
        judged_N = np.where(draw(chance_N, generator), gold_N, np.nan)
        found = estimate_gold(proxy_N, judged_N, chance_N, prompt_N, slope.value)
        slope.add(proxy_N, judged_N, chance_N)
        if found.degrees and trend.add(number, found.gold, found.variance, found.degrees):
            return number
    return None


def measured(design: tuple[int, int, float], looks: int, criteria: int) -> dict[str, Any]:
    """Of one design: by mean the flat runs with an alarm, by fall the runs that found it, once it had begun."""
    generator = np.random.default_rng(SEED)
    middle = looks // 2
    flat = {
        str(mean): sum(alarm(generator, [mean] * looks, *design, criteria) is not None for _ in range(FLAT_RUNS))
        for mean in FLAT
    }
    falls = {}
    for before, after in FALLS:
        means = [before] * middle + [after] * (looks - middle)
        found = [alarm(generator, means, *design, criteria) for _ in range(FALLING_RUNS)]
        falls[f"{before} to {after}"] = sum(look is not None and look > middle for look in found)
    return {"flat": flat, "found": falls}


def main() -> None:
    rows = [(design, looks, name) for design in DESIGNS for looks in LOOKS for name in CRITERIA]
    found: list[dict[str, Any]] = [
        {"prompts": design[0], "rollouts": design[1], "judged": design[2], "looks": looks, "gold": name}
        | measured(design, looks, CRITERIA[name])
        for design, looks, name in track(rows, "simulating", console=Console(stderr=True), transient=True)
    ]
    config = {"flat_runs": FLAT_RUNS, "falling_runs": FALLING_RUNS, "seed": SEED}
    write_findings("alarms", config, {"designs": found})
    table = Table("prompts × rollouts", "judged", "looks", "gold", "false alarms", *found[0]["found"])
    for row in found:
        shape = f"{row['prompts']} × {row['rollouts']}", f"{row['judged']:.0%}", str(row["looks"]), row["gold"]
        flat = f"{sum(row['flat'].values())} of {FLAT_RUNS * len(FLAT)}"
        table.add_row(*shape, flat, *(f"{count} of {FALLING_RUNS}" for count in row["found"].values()))
    Console().print(table)


if __name__ == "__main__":
    main()
