"""What of an RL run is worth telling: the verdict in words, gold against KL, change by criterion, the texts to read.

Pure: from what `policy.run_folder` read to what `policy.run_page` and `policy.comparison` show.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from policy.run_folder import JudgedRollout, Row, Run
from policy.tally import PREFIX, CriterionMeans, tallied
from policy.watching import DECLINE, DIVERGENCE
from rm.page import counted, number, percent, side, signed_interval

_CRITERIA = 3  # of a rollout

Estimated = Mapping[str, Any]  # value, low, high: numbers, or None


# --- the verdict in words --------------------------------------------------------------------------------------------


def verdict(run: Run) -> list[str]:
    """What a run came to, a sentence or two each: gold, proxy and whether they part, alarms, KL and the best, form."""
    told = [_progress_in_words(run)] if run.result is None else [_gold_in_words(run.result)]
    told += [] if run.result is None else [_proxy_in_words(run.result)]
    told += [_alarm_in_words(run), _kl_in_words(run)]
    told += [] if run.result is None else [_form_in_words(run.result)]
    return [sentence for sentence in told if sentence]


def _progress_in_words(run: Run) -> str:
    told = f"Update {run.progress}; held-out prompts are answered again at the end."
    if len(run.looks) > 1:
        first, last = run.looks[0], run.looks[-1]
        told += f" The judge's reward of the rollouts (gold) was {_words(gold_of(first))} at update {first['step']},"
        told += f" and {_words(gold_of(last))} at update {last['step']}."
    return told


def _gold_in_words(result: dict[str, Any]) -> str:
    return _change(f"On {held_out(result)} the judge's reward (gold)", result, "gold")


def _proxy_in_words(result: dict[str, Any]) -> str:
    told = _change("The reward model's (proxy)", result, "proxy")
    gap = result.get("gain_gap")
    if gap is None or gap["value"] is None:
        return told
    parting = {
        "ahead": "It gained more than gold, so the two part",
        "behind": "It gained less than gold",
        "": "The two gains cannot be told apart",
    }[side(gap)]
    return f"{told} {parting}: proxy less gold {signed_interval(gap)}."


def _change(of: str, result: dict[str, Any], key: str) -> str:
    before, after, gain = (result[f"{key}_{when}"] for when in ("before", "after", "gain"))
    if gain["value"] is None:
        return f"{of} is unknown: no prompt has it before and after."
    found = side(gain) if result["prompts_evaluated"] > 1 else ""  # of one prompt, an interval has no width
    moved = {"ahead": "rose", "behind": "fell", "": "did not change measurably,"}[found]
    return f"{of} {moved} from {number(before['value'])} to {number(after['value'])}: {signed_interval(gain)}."


def _alarm_in_words(run: Run) -> str:
    if not run.sure_looks:
        return "No alarm was possible: no look of the judge has an interval."
    apart, declined = first_alarm(run.rows, DIVERGENCE), first_alarm(run.rows, DECLINE)
    told = [] if apart is None else [f"Proxy and gold drifted apart: a warning at update {apart}."]
    if declined is not None:
        then = {
            "rollback": f"training ended, and the policy was given back what it was at update {best_step(run.rows)}",
            "stop": "training ended",
            "warn": "training was left to go on",
        }[run.config.get("on_alarm", "warn")]
        told.append(f"Gold declined: an alarm at update {declined}, and {then}.")
    return " ".join(told) or f"No alarm in {counted(len(run.sure_looks), 'look')} of the judge."


def _kl_in_words(run: Run) -> str:
    kl, best = kl_spent(run), best_row(run.rows)
    told = [] if kl is None else [f"It spent a KL of {number(kl, 2)} nats a response."]
    if best is not None:
        at = f"update {best['step']}" + ("" if best["kl"] is None else f", KL {number(best['kl'], 2)}")
        told.append(f"Gold was best about {at}, where the rollouts earned {_words(gold_of(best))}.")
    return " ".join(told)


def _form_in_words(result: dict[str, Any]) -> str:
    tokens = [number(result[f"mean_tokens_{when}"], 1) for when in ("before", "after")]
    shares = [percent(result[f"finished_share_{when}"]) for when in ("before", "after")]
    return f"Responses went from {tokens[0]} to {tokens[1]} tokens; {shares[1]} end by themselves, {shares[0]} before."


def held_out(result: dict[str, Any]) -> str:
    """How many prompts gains are of."""
    return counted(result["prompts_evaluated"], "held-out prompt")


def _words(one: Estimated) -> str:
    ends = "" if one["low"] is None else f" [{number(one['low'], 2)}, {number(one['high'], 2)}]"
    return f"{number(one['value'])}{ends}"


# --- of the updates --------------------------------------------------------------------------------------------------


def gold_of(row: Row) -> Estimated:
    """The judge's reward at a look, with its interval if it has one."""
    return {"value": row["reward/gold"], "low": row.get("reward/gold_low"), "high": row.get("reward/gold_high")}


def first_alarm(rows: Sequence[Row], kind: str) -> int | None:
    """The first update with an alarm of ``kind``."""
    return next((row["step"] for row in rows if row.get("alarm") == kind), None)


def best_step(rows: Sequence[Row]) -> int | None:
    """The update with the best gold so far."""
    return rows[-1].get("best_step")


def best_row(rows: Sequence[Row]) -> Row | None:
    """The row of `best_step`."""
    return next((row for row in rows if row["step"] == best_step(rows)), None)


def kl_spent(run: Run) -> float | None:
    """KL of the policy that is left, or of the last update while the run goes on."""
    return run.rows[-1]["kl"] if run.result is None else run.result["kl_final"]


@dataclass(frozen=True)
class Point:
    """One or several neighbouring looks: their mean KL, proxy, and gold with its interval, if all have one."""

    kl: float
    proxy: float | None
    gold: Estimated


def against_kl(looks: Sequence[Row], most: int) -> list[Point]:
    """Looks with a KL, in their order, averaged over neighbours down to ``most`` points.

    Looks are of different rollouts, so half of the interval of a mean of m is sqrt(sum of squared half-widths) / m.
    """
    known = [row for row in looks if row["kl"] is not None]
    parts = np.array_split(np.arange(len(known)), min(most, len(known))) if known else []
    return [_point([known[place] for place in part]) for part in parts]


def _point(rows: Sequence[Row]) -> Point:
    gold = float(np.mean([row["reward/gold"] for row in rows]))
    ends = [(row["reward/gold_low"], row["reward/gold_high"]) for row in rows if row.get("reward/gold_low") is not None]
    half = math.sqrt(sum(((high - low) / 2) ** 2 for low, high in ends)) / len(rows)
    sure = len(ends) == len(rows)
    proxies = [row["reward/proxy"] for row in rows if row["reward/proxy"] is not None]
    return Point(
        kl=float(np.mean([row["kl"] for row in rows])),
        proxy=float(np.mean(proxies)) if proxies else None,
        gold={"value": gold, "low": gold - half if sure else None, "high": gold + half if sure else None},
    )


@dataclass(frozen=True)
class CriterionCurve:
    """What the reward model said of a tag's criteria, by update; updates without them are left out."""

    name: str
    values: tuple[float, ...]

    @property
    def first(self) -> float:
        """Mean of the first quarter of the updates."""
        return float(np.mean(self.values[: self._quarter]))

    @property
    def last(self) -> float:
        """Mean of the last quarter."""
        return float(np.mean(self.values[-self._quarter :]))

    @property
    def change(self) -> float:
        """Last quarter less the first."""
        return self.last - self.first

    @property
    def _quarter(self) -> int:
        return math.ceil(len(self.values) / 4)


def criterion_curves(rows: Sequence[Row]) -> list[CriterionCurve]:
    """Of every metric ``criteria/<name>``; the largest change first."""
    values = {
        key: tuple(row[key] for row in rows if row.get(key) is not None)
        for key in dict.fromkeys(key for row in rows for key in row if key.startswith(PREFIX))
    }
    found = [CriterionCurve(key.removeprefix(PREFIX), own) for key, own in values.items() if own]
    return sorted(found, key=lambda one: (-abs(one.change), one.name))


# --- texts to read ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A held-out prompt, one response before, and the one after that was sampled with the same random numbers."""

    prompt_id: str
    prompt: str
    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def gold(self) -> float:
        """Change of the judge's reward; NaN if one of the two has none."""
        return _difference(self.after["gold"], self.before["gold"])

    @property
    def proxy(self) -> float:
        """Change of the reward model's reward, likewise."""
        return _difference(self.after["proxy"], self.before["proxy"])


def pairs_of(samples: Sequence[dict[str, Any]]) -> list[Pair]:
    """Every response before with its own after."""
    return [
        Pair(sample["prompt_id"], sample["prompt"], before, after)
        for sample in samples
        for before, after in zip(sample["before"], sample["after"], strict=True)
    ]


def furthest_pairs(pairs: Sequence[Pair], by: Callable[[Pair], float], most: int) -> list[Pair]:
    """The pairs with the largest positive ``by``, at most one of a prompt, the largest first."""
    found: dict[str, Pair] = {}
    for pair in sorted((pair for pair in pairs if by(pair) > 0), key=lambda pair: -by(pair)):
        found.setdefault(pair.prompt, pair)
    return list(found.values())[:most]


def overrated(rollouts: Sequence[JudgedRollout], most: int) -> list[JudgedRollout]:
    """The rollouts whose proxy is furthest above their gold, each response once, the furthest first."""
    found: dict[tuple[str, str], JudgedRollout] = {}
    for one in sorted((one for one in rollouts if one.proxy > one.gold), key=lambda one: one.gold - one.proxy):
        found.setdefault((one.record.prompt, one.record.response), one)
    return list(found.values())[:most]


def overrated_criteria(rollout: JudgedRollout) -> list[tuple[str, float, float]]:
    """Text, P(met) and verdict of the criteria on which the model is furthest from the judge in the policy's favour."""
    criteria = rollout.record.rubric.criteria
    gap_K = np.nan_to_num((rollout.probs - rollout.verdicts) * np.sign([one.weight for one in criteria]))
    order = [place for place in np.argsort(-gap_K, kind="stable")[:_CRITERIA] if gap_K[place] > 0]
    return [(criteria[k].text, float(rollout.probs[k]), float(rollout.verdicts[k])) for k in order]


@dataclass(frozen=True)
class CriterionSides:
    """Mean P(met) by the model and mean verdict of the judge, over the same ``answers`` to criteria of one tag."""

    name: str
    answers: int
    model: float
    judge: float

    @property
    def gap(self) -> float:
        """Model less judge."""
        return self.model - self.judge


def criterion_sides(rollouts: Sequence[JudgedRollout]) -> list[CriterionSides]:
    """By tag of the criterion, or text; the furthest apart first. What one of the two left unanswered is left out."""
    means = CriterionMeans(one.record.rubric for one in rollouts)
    known = [(one, np.isnan(one.probs + one.verdicts)) for one in rollouts]
    model, judge = (
        means.sums(tallied((one.record.rubric, np.where(masked, np.nan, getattr(one, side))) for one, masked in known))
        for side in ("probs", "verdicts")
    )
    found = [
        CriterionSides(name.removeprefix(PREFIX), count, total / count, judge[name][0] / count)
        for name, (total, count) in model.items()
    ]
    return sorted(found, key=lambda one: (-abs(one.gap), one.name))


def _difference(after: float | None, before: float | None) -> float:
    return math.nan if after is None or before is None else after - before
