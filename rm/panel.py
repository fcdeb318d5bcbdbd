"""The signal and noise panel: which metrics tell training recipes apart, and what would make them tell more.

`panel` makes every number from the predictions of checkpoints (docs/metrics.md names each key); `run_snr` reads
runs and data and writes the run folder. The formulas are `rm.snr`, what it looks like is `rm.snr_report`.

Letters as in `rm.snr`; X as in `rm.bench`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rm import metrics, snr, snr_report
from rm.bench import METRICS, TITLES, Bench, Better, Run, Values, estimate, last_of, signal_noise
from rm.config import SnrConfig
from rm.interventions import averaging, continuous, filtering
from rm.sides import require_unmasked
from rm.snr_slices import slices
from rubric_data.errors import UserError
from rubric_data.files import json_number, start_run, write_json, write_text
from rubric_data.records import JudgedResponse, content_hash
from rubric_data.split import of_split

_NOT_ADVISED = "ece"  # a constant prediction can have none: however steady, it must not choose a checkpoint
_SELECTABLE = {name: name for name in ("accuracy", "auroc", "brier", "pair_accuracy")} | {"log_loss": "loss"}
_FIXED = ("data", "split", "data_hash")  # what the scores of a resumed run depend on


@dataclass(frozen=True)
class Scale:
    """How much a run of a ladder was given: different verdicts it was trained on, weights of its backbone."""

    verdicts: float
    parameters: float


def run_snr(config: SnrConfig) -> dict[str, Any]:
    """Score the checkpoints that have no scores yet; write snr.json and snr.html; print the table.

    Raises UserError on settings out of range, on runs that are none or have too few checkpoints, on score files that
    do not fit the data, on a split without verdicts, or on a run folder in use.
    """
    from rm.checkpoints import find, scale, score_runs  # here, for these bring torch
    from rm.data import load_judged

    _check(config)
    records = of_split(load_judged(config.data), config.split)
    require_unmasked("snr", records)
    small, ladder = config.small or [], config.ladder or []
    paths = list(dict.fromkeys([*config.runs, *small, *ladder]))
    trained = {path: find(path, last=config.last, early=config.early) for path in paths}
    scales = [scale(trained[path]) for path in ladder]
    _check_ladder(scales)
    settled = asdict(config) | {"data_hash": content_hash([record.model_dump(mode="json") for record in records])}
    folder = start_run(config.output, settled, resume=config.resume, free=settled.keys() - set(_FIXED))
    scored = score_runs(
        [trained[path] for path in paths],
        _names(paths),
        records,
        folder / "scores",
        last=config.last,
        average=config.average if config.average_weights and config.last >= 2 * config.average else 0,
        tokens_per_batch=config.tokens_per_batch,
    )
    by_path = dict(zip(paths, scored, strict=True))
    facts = {"data": config.data, "split": config.split, "runs": config.runs, "small": small, "ladder": ladder}
    result = {"facts": facts} | panel(
        records,
        [by_path[path] for path in config.runs],
        small=[by_path[path] for path in small],
        ladder=[(by_path[path], one) for path, one in zip(ladder, scales, strict=True)],
        last=config.last,
        average=config.average,
        tail=config.tail,
        min_prompts=config.min_prompts,
        bootstrap=config.bootstrap,
        seed=config.seed,
        progress=True,
    )
    write_json(folder / "snr.json", result)
    write_text(folder / "snr.html", snr_report.render(result))
    console = Console()
    console.print(snr_report.summary_table(result))
    console.print(result["recommendation"]["text"], soft_wrap=True, markup=False)
    console.print(f"report: {folder / 'snr.html'}", soft_wrap=True, markup=False)
    return result


def panel(
    records: Sequence[JudgedResponse],
    runs: Sequence[Run],
    *,
    small: Sequence[Run] = (),
    ladder: Sequence[tuple[Run, Scale]] = (),
    last: int = 6,
    average: int = 2,
    tail: float = 0.25,
    min_prompts: int = 10,
    bootstrap: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Signal and noise of every metric and slice over ``runs``, one run of each recipe, as JSON-able values.

    Every run needs ``last`` checkpoints; those it has before them show how early it orders recipes as in the end.
    ``small``: a cheaper run of each recipe, in the order of ``runs``. ``ladder``: runs of one recipe by scale.
    Intervals come from ``bootstrap`` resamples of prompts, the same for all. Masked verdicts are left out.

    Raises ValueError on fewer than two runs, too few checkpoints, or predictions that do not fit the records.
    """
    everyone = {id(run): run for run in [*runs, *small, *(run for run, _ in ladder)]}  # each is measured once
    if len(runs) < 2 or any(len(run.predictions) < last for run in everyone.values()):
        raise ValueError(f"panel: needs two runs or more, and {last} checkpoints of each")
    bench = Bench.of(records, tail, bootstrap, seed)
    measured = {key: bench.measure_run(run, progress=progress) for key, run in everyone.items()}
    curves = [measured[id(run)] for run in runs]
    ends = last_of(curves, last)
    small_ends = last_of([measured[id(run)] for run in small], last)
    rungs = last_of([measured[id(run)] for run, _ in ladder], last)
    scales = [one for _, one in ladder]
    ratios = {name: snr.signal_noise(value_XRC).snr for name, value_XRC in ends.items()}
    run_ratios = {name: snr.run_ratios(value_XRC) for name, value_XRC in ends.items()}
    decisions = _decisions(runs, curves, ends)
    floor = snr.noise_floor(len(runs), last, metrics.LEVEL)
    table = bench.table
    return {
        "prompts": table.prompts,
        "responses": len(records),
        "verdicts": len(table.gold_N),
        "masked": int((~table.known_N).sum()),
        "last": last,
        "tail": tail,
        "min_prompts": min_prompts,
        "bootstrap": bootstrap,
        "seed": seed,
        "level": metrics.LEVEL,
        "noise_floor": json_number(floor),
        "runs": [{"name": run.name, "steps": list(run.steps)} for run in runs],
        "metrics": {
            name: {"better": better}
            | signal_noise(ends[name])
            | {
                "runs": [
                    _curve(curve[name], last) | {"snr": estimate(ratio_X)}
                    for curve, ratio_X in zip(curves, run_ratios[name].T, strict=True)
                ],
                "decision": decisions[name].as_dict(),
                "small": _small(small_ends[name], ends[name]) if small else None,
                "ladder": _foretold(rungs[name], scales, better) if ladder else None,
            }
            for name, better in METRICS.items()
        },
        "ladder": _ladder_facts(ladder) if ladder else None,
        "slices": slices(bench, records, runs, last=last, min_prompts=min_prompts, progress=progress),
        "averaging": averaging(bench, runs, ends, average),
        "continuous": continuous(ratios, {name: one.mean_X for name, one in decisions.items()}),
        "filtering": filtering(bench, records, runs, last=last, min_prompts=min_prompts, seed=seed),
        "recommendation": _recommendation(ratios, run_ratios, [run.name for run in runs], floor),
    }


# --- what is asked for -----------------------------------------------------------------------------------------------


def _check(config: SnrConfig) -> None:
    if len(config.runs) < 2:
        raise UserError(f"runs: signal is what differs between recipes, and needs two runs; got {len(config.runs)}")
    for name in ("runs", "small", "ladder"):
        given = [Path(path).resolve() for path in getattr(config, name) or []]
        if len(set(given)) < len(given):
            raise UserError(f"{name}: a run stands there twice; remove one")
    if config.small and len(config.small) != len(config.runs):
        raise UserError(f"small: needs a run for each of the {len(config.runs)} in runs, got {len(config.small)}")
    if not 0 < config.tail <= 1:
        raise UserError(f"tail: must lie in (0, 1], got {config.tail}; 0.25 is each prompt's top quarter")
    for name, least in (("last", 2), ("early", 0), ("average", 2), ("min_prompts", 1), ("bootstrap", 1)):
        if getattr(config, name) < least:
            raise UserError(f"{name}: must be at least {least}, got {getattr(config, name)}; raise it")


def _check_ladder(scales: Sequence[Scale]) -> None:
    """Raise UserError unless the largest run can be foretold from the others."""
    if not scales:
        return
    sizes_LS = _sizes(scales)
    largest_L = _largest(sizes_LS)
    if largest_L.sum() != 1:
        raise UserError("ladder: one run must be the largest in both verdicts and weights; leave out its equals")
    below_LS = sizes_LS[~largest_L]
    varied_S = _varied(below_LS)
    if not varied_S.any() or (sizes_LS.max(0) != below_LS.max(0))[~varied_S].any():
        raise UserError("ladder: what the largest run has more of must differ between the others too; add runs")
    needed = snr.runs_needed(int(varied_S.sum())) + 1
    if len(scales) < needed:
        raise UserError(f"ladder: needs {needed} runs for what differs between them, got {len(scales)}; add runs")


def _names(paths: Sequence[str]) -> list[str]:
    """Each path without the folders that all of them share."""
    parts = [Path(path).resolve().parts for path in paths]
    shared = 0
    while all(len(part) > shared + 1 for part in parts) and len({part[shared] for part in parts}) == 1:
        shared += 1
    return ["/".join(part[shared:]) for part in parts]


def _curve(value_XC: np.ndarray, last: int) -> dict[str, Any]:
    """One run: its values by checkpoint, and mean and standard deviation of the last ones."""
    end_C = value_XC[0, -last:]
    return {
        "values": [json_number(value) for value in value_XC[0]],
        "mean": json_number(end_C.mean()),
        "deviation": json_number(end_C.std(ddof=1)),
    }


# --- decisions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Decisions:
    """How far one metric orders recipes as in the end, (X,): by share of training, and by one late checkpoint."""

    early: Mapping[float, np.ndarray]
    late_X: np.ndarray

    @property
    def mean_X(self) -> np.ndarray:
        """Over the early shares; of late checkpoints where there are none."""
        return np.mean(list(self.early.values()), 0) if self.early else self.late_X

    def as_dict(self) -> dict[str, Any]:
        early = [{"share": json_number(share), "accuracy": estimate(found)} for share, found in self.early.items()]
        return {"early": early, "late": estimate(self.late_X), "mean": estimate(self.mean_X)}


def _decisions(runs: Sequence[Run], curves: Sequence[Values], ends: Values) -> dict[str, _Decisions]:
    """Against the mean of each run's last checkpoints; a late one against the mean of the others."""
    found = {}
    for name, end_XRC in ends.items():
        last = end_XRC.shape[-1]
        final_XR, others_XRC = end_XRC.mean(-1), snr.without_one(end_XRC)
        early = {}
        for share, places in _early_places(runs, last).items():
            value_XR = np.stack([curve[name][:, place] for curve, place in zip(curves, places, strict=True)], 1)
            early[share] = snr.decision_accuracy(value_XR, final_XR)
        late = [snr.decision_accuracy(end_XRC[..., place], others_XRC[..., place]) for place in range(last)]
        found[name] = _Decisions(early, np.mean(late, 0))
    return found


def _early_places(runs: Sequence[Run], last: int) -> dict[float, tuple[int, ...]]:
    """By share of training: the place of each run's latest checkpoint up to there that is not among its last ones."""
    shares = [np.array(run.steps[: len(run.steps) - last]) / run.steps[-1] for run in runs]
    found: dict[tuple[int, ...], float] = {}
    for share in sorted({float(share) for each in shares for share in each}):
        places = tuple(int(np.searchsorted(each, share, side="right")) - 1 for each in shares)
        if min(places) >= 0:
            found.setdefault(places, share)
    return {share: places for places, share in found.items()}


def _small(small_XRC: np.ndarray, end_XRC: np.ndarray) -> dict[str, float | None]:
    return estimate(snr.decision_accuracy(small_XRC.mean(-1), end_XRC.mean(-1)))


# --- the scaling ladder ----------------------------------------------------------------------------------------------


def _sizes(scales: Sequence[Scale]) -> np.ndarray:
    return np.array([(one.verdicts, one.parameters) for one in scales], float)


def _largest(sizes_LS: np.ndarray) -> np.ndarray:
    """Which runs have the most of everything, (L,) bool."""
    return (sizes_LS == sizes_LS.max(0)).all(-1)


def _varied(sizes_LS: np.ndarray) -> np.ndarray:
    """Which scales differ between the runs, (S,) bool."""
    return np.ptp(sizes_LS, axis=0) > 0


def _ladder_facts(ladder: Sequence[tuple[Run, Scale]]) -> dict[str, Any]:
    runs = [{"name": run.name, "verdicts": round(one.verdicts), "parameters": one.parameters} for run, one in ladder]
    largest_L = _largest(_sizes([one for _, one in ladder]))
    return {"runs": runs, "held_out": ladder[int(np.argmax(largest_L))][0].name}


def _foretold(value_XLC: np.ndarray, scales: Sequence[Scale], better: Better) -> dict[str, Any]:
    """The largest run's metric from a law fitted on the others: of means over the last checkpoints, and of the last."""
    sizes_LS = _sizes(scales)
    largest_L = _largest(sizes_LS)
    sizes_LS = sizes_LS[:, _varied(sizes_LS[~largest_L])]
    value_LC = value_XLC[0]
    return {
        way: _law(sizes_LS, value_L, largest_L, better)
        for way, value_L in (("averaged", value_LC.mean(-1)), ("last", value_LC[:, -1]))
    }


def _law(sizes_LS: np.ndarray, value_L: np.ndarray, largest_L: np.ndarray, better: Better) -> dict[str, Any]:
    if np.isnan(value_L).any():
        return dict.fromkeys(("observed", "predicted", "relative_error", "law"))
    error_L = 1 - value_L if better == "higher" else value_L
    law = snr.fit_power_law(sizes_LS[~largest_L], error_L[~largest_L])
    error = float(law(sizes_LS[largest_L])[0])
    observed, predicted = float(value_L[largest_L][0]), 1 - error if better == "higher" else error
    return {
        "observed": json_number(observed),
        "predicted": json_number(predicted),
        "relative_error": json_number(abs(predicted - observed) / abs(observed)) if observed else None,
        "law": {
            "floor": json_number(law.floor),
            "factors": [json_number(factor) for factor in law.factor_S],
            "exponents": [json_number(exponent) for exponent in law.exponent_S],
            "references": [json_number(size) for size in law.reference_S],
        },
    }


# --- recommendation --------------------------------------------------------------------------------------------------


def _recommendation(ratios: Values, run_ratios: Values, runs: Sequence[str], floor: float) -> dict[str, Any]:
    """The metric with the best ratio, those that cannot be told from it, and both in words.

    ``ratios`` (X,) and ``run_ratios`` (X, R) of every metric, ``runs`` their names.
    """
    defined = {name: ratio for name, ratio in ratios.items() if name != _NOT_ADVISED and not np.isnan(ratio[0])}
    ranked = sorted(defined, key=lambda name: -defined[name][0])
    if not ranked:
        text = "No metric has a signal-to-noise ratio: all the last checkpoints of every run give the same values."
        return {"metric": None, "equals": [], "select_by": None, "text": text}
    best = ranked[0]
    alone = _alone(run_ratios[best][0], runs)
    equals = [name for name in ranked[1:] if not _above(defined[best] - defined[name], 0)]
    if not _above(defined[best], floor):
        text = (
            f"No metric tells these {len(runs)} recipes from noise for certain. The best is {TITLES[best]}: the "
            f"recipes differ by {_times(defined[best])} its noise, and equal ones may by {floor:.1f}.{alone} Judge "
            "more validation prompts, keep more checkpoints, or compare recipes that differ more."
        )
        return {"metric": None, "equals": [best, *equals], "select_by": None, "text": text}
    text = f"Select checkpoints by {TITLES[best]}: these {len(runs)} recipes differ by {_times(defined[best])} its "
    text += f"noise.{alone}"
    if equals:
        text += f" On these prompts it cannot be told from {_listed([TITLES[name] for name in equals])}."
    if worse := [name for name in ranked[1:] if name not in equals]:
        text += f" Surely to be trusted less is {TITLES[worse[-1]]}, with {_times(defined[worse[-1]])}."
    selectable = next((name for name in ranked if name in _SELECTABLE), None)
    select_by = None if selectable is None else _SELECTABLE[selectable]
    if selectable is not None:
        among = "" if selectable == best else f" Of what training can select by, the best is {TITLES[selectable]}."
        text += f"{among} In training: --select_by {select_by}."
    return {"metric": best, "equals": equals, "select_by": select_by, "text": text}


def _alone(ratio_R: np.ndarray, runs: Sequence[str]) -> str:
    """A sentence on the runs with most and least noise; none where fewer than two have any."""
    known = sorted((ratio, name) for ratio, name in zip(ratio_R.tolist(), runs, strict=True) if not np.isnan(ratio))
    if len(known) < 2:
        return ""
    (low, noisy), (high, steady) = known[0], known[-1]
    return f" Over the noise of one run alone that is from {low:.1f} ({noisy}) to {high:.1f} times ({steady})."


def _above(value_X: np.ndarray, bound: float) -> bool:
    """Whether the interval lies above ``bound``."""
    low = estimate(value_X)["low"]
    return low is not None and low > bound


def _times(ratio_X: np.ndarray) -> str:
    found = estimate(ratio_X)
    interval = "" if found["low"] is None else f" [{found['low']:.1f}, {found['high']:.1f}]"
    return f"{found['value']:.1f}{interval} times"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
