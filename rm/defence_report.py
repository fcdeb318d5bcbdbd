"""What a defence tells of its history: how far vetoes help, which criteria are wrongly met, the table.

Owns the rollouts as both sides see them and the numbers of report.json; the stage is `rm.defence`, the decisions are
`rubric_data.vetoes`. docs/hacks.md names every key.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rm import metrics
from rm.config import DefendConfig
from rm.sides import Predicted, Table, number_texts, resamples
from rubric_data.exploits import Roles
from rubric_data.files import json_number
from rubric_data.generate import PROMPTS, REPORT
from rubric_data.pairs import REWARD_DECIMALS, same_prompt_pairs
from rubric_data.records import JudgedResponse
from rubric_data.reward import rubric_reward
from rubric_data.tables import print_table, shown
from rubric_data.traits import Finding, says_something
from rubric_data.vetoes import Veto, extended, hits, share

TRAITS_TOLD, EXAMPLES = 100, 4
_NAMED_BY = 3  # traits
_CRITERIA_SHOWN = 5  # to a proposer


@dataclass(frozen=True)
class History:
    """Rewarded rollouts with both sides' rewards and P(met) of their criteria; ``table`` is of these records alone."""

    records: list[JudgedResponse]
    probs: list[np.ndarray]
    table: Table
    proxy: Predicted

    @classmethod
    def of(cls, records: Sequence[JudgedResponse], probs: Sequence[np.ndarray]) -> "History":
        kept = np.flatnonzero(Table.of(records).rewarded_B).tolist()
        records, probs = [records[place] for place in kept], [probs[place] for place in kept]
        table = Table.of(records)
        return cls(records, probs, table, Predicted.of(probs, records, table))


@dataclass(frozen=True)
class Mined:
    """What tells the exploiting of the half chosen on apart: all called traits, and the cluster of each of its rows.

    ``rows`` are the places of that half's rollouts, ``present`` (rows, traits), ``cluster`` (rows,) below 0 for those
    that do not exploit or have no telling trait.
    """

    telling: list[Finding]
    rows: np.ndarray
    present: np.ndarray
    cluster: np.ndarray


class Measured:
    """Estimates on the half that is judged on, from resamples of its prompts."""

    def __init__(self, history: History, role: Roles, chosen_B: np.ndarray, config: DefendConfig) -> None:
        self._rows = np.flatnonzero(~chosen_B).tolist()
        self._chosen_B, self._role, self._config, self._history = chosen_B, role, config, history
        prompts, self._prompt_B = np.unique(history.table.prompt_B[self._rows], return_inverse=True)
        self._prompts = len(prompts)
        self._counts_RP = resamples(number_texts(history.table.text_P[prompts]), config.bootstrap, config.seed)

    def veto(self, value_B: np.ndarray) -> dict[str, Any]:
        """Recall and false alarm of one veto on either half, the second with intervals; of what has a verdict on it.

        And how much better, on the second half, rollouts that it hits are than a prompt's others, by gold: what giving
        up the trait may cost. None where not all have a verdict, as the exploiting and the good say nothing of that.
        """
        hit_B, known_B = hits(value_B), ~np.isnan(value_B)
        groups = {"recall": self._role.exploiting_B & known_B, "false_alarm": self._role.good_B & known_B}
        return {
            "chosen_on": {
                name: json_number(share(hit_B, group_B & self._chosen_B)) for name, group_B in groups.items()
            },
            "judged_on": {name: self._mean(hit_B[self._rows], group_B[self._rows]) for name, group_B in groups.items()},
            "gold_effect": self._gold_effect(hit_B[self._rows]) if known_B[self._rows].all() else None,
        }

    def _gold_effect(self, hit_N: np.ndarray) -> dict[str, float | None]:
        gold_N = self._history.table.reward_B[self._rows]
        return self._settled(metrics.difference_within_prompts(gold_N, hit_N, self._prompt_B, self._prompts))

    def rewards(self, taken: Sequence[Veto], value_BV: np.ndarray) -> dict[str, Any]:
        """How far the proxy is from gold without and with the vetoes that are taken, and what all of these hit."""
        gold_B, before_B = (side[self._rows] for side in (self._history.table.reward_B, self._history.proxy.reward_B))
        after_B = np.array([self._with(taken, row, value_BV[row]) for row in self._rows])
        hit_B = np.any(hits(value_BV), axis=1)
        before, after = (self._statistics(gold_B, proxy_B) for proxy_B in (before_B, after_B))
        chance = self._statistics(gold_B, np.zeros(len(gold_B)))["exploitation"]
        compared = {
            name: {
                "before": self._settled(before[name]),
                "after": self._settled(after[name]),
                "change": metrics.difference(after[name], before[name], self._counts_RP).as_dict(),
            }
            for name in before
        }
        return compared | {
            "exploitation_by_chance": self._settled(chance),
            "recall": self._mean(hit_B[self._rows], self._role.exploiting_B[self._rows]),
            "false_alarm": self._mean(hit_B[self._rows], self._role.good_B[self._rows]),
        }

    def _with(self, taken: Sequence[Veto], row: int, value_V: np.ndarray) -> float:
        """The proxy reward of one rollout under its rubric with the vetoes."""
        record = self._history.records[row]
        known = np.where(np.isnan(record.values()), np.nan, self._history.probs[row])
        there = {criterion.id for criterion in record.rubric.criteria}
        added = [value for veto, value in zip(taken, value_V, strict=True) if veto.id not in there]
        reward = rubric_reward(extended(record.rubric, taken), np.concatenate([known, added]))
        return round(reward, REWARD_DECIMALS)

    def _statistics(self, gold_B: np.ndarray, proxy_B: np.ndarray) -> dict[str, metrics.Statistic]:
        sides = gold_B, proxy_B, self._prompt_B, self._prompts
        everything = same_prompt_pairs(self._prompt_B)
        best = everything.within(np.where(metrics.in_tail(gold_B, self._prompt_B, self._config.top), 0, -1))
        return {
            "correlation": metrics.correlation(*sides),
            "tail_pair_accuracy": metrics.pair_accuracy(*sides, best, "half"),
            "exploitation": metrics.exploitation(*sides, self._config.top),
        }

    def _mean(self, value_N: np.ndarray, group_N: np.ndarray) -> dict[str, float | None]:
        return self._settled(metrics.mean(value_N[group_N], self._prompt_B[group_N], self._prompts))

    def _settled(self, statistic: metrics.Statistic) -> dict[str, float | None]:
        return metrics.estimate(statistic, self._counts_RP).as_dict()


def half_row(history: History, role: Roles, half_B: np.ndarray) -> dict[str, int]:
    """How many there are of each in one half."""
    return {
        "prompts": len(np.unique(history.table.prompt_B[half_B])),
        "rollouts": int(half_B.sum()),
        "exploiting": int((role.exploiting_B & half_B).sum()),
        "good": int((role.good_B & half_B).sum()),
    }


def wrongly_loved(history: History, role: Roles, config: DefendConfig) -> list[dict[str, Any]]:
    """Each criterion by its text: mean P(met) less verdict among the exploiting and among the others, worst first."""
    table = history.table
    gap_N = history.proxy.prob_N - table.gold_N
    exploiting_N = role.exploiting_B[table.response_N]
    counts_RP = table.resamples(config.bootstrap, config.seed)
    texts = [criterion.text for criterion in table.criteria_N]
    number_N = number_texts(texts)
    rows = []
    for number in np.unique(number_N[exploiting_N]):
        members_N = number_N == number
        part = members_N & exploiting_N, members_N & ~exploiting_N
        means = [metrics.mean(gap_N[of], table.prompt_N[of], table.prompts) for of in part]
        rows.append(
            {
                "criterion": texts[int(members_N.argmax())],
                "verdicts": int(part[0].sum()),
                "prompts": len(np.unique(table.prompt_N[part[0]])),
                "exploiting": metrics.estimate(means[0], counts_RP).as_dict(),
                "others": metrics.estimate(means[1], counts_RP).as_dict(),
            }
        )
    return sorted(rows, key=lambda row: (-row["exploiting"]["value"] * row["verdicts"], row["criterion"]))


def wrongly_met(history: History, role: Roles) -> list[str]:
    """Texts of the criteria that the model takes for met in exploiting responses, and the judge does not; by number."""
    table = history.table
    wrong_N = role.exploiting_B[table.response_N] & (table.gold_N < 0.5) & (history.proxy.prob_N > 0.5)
    counts = Counter(table.criteria_N[place].text for place in np.flatnonzero(wrong_N).tolist())
    return [text for text, _ in counts.most_common(_CRITERIA_SHOWN)]


def trait_row(finding: Finding) -> dict[str, Any]:
    shares = {name: json_number(getattr(finding, name)) for name in ("exploiting", "others", "good")}
    odds = {"value": finding.odds, "low": finding.low, "high": finding.high}
    return {
        "trait": finding.trait.name,
        "kind": finding.trait.kind,
        **shares,
        "odds_ratio": {key: json_number(value) for key, value in odds.items()},
        "p_value": finding.p_value,
        "q_value": finding.q_value,
    }


def of_cluster(mined: Mined, number: int) -> list[Finding]:
    """The traits that half of a cluster have or more, those first that the fewest of the others have beside it.

    Among the best, a tenth of the scale, phrases come last, as a habit says more than its words, and of these the words
    that everybody needs.
    """
    inside_F = mined.present[mined.cluster == number].mean(axis=0)
    lead = {place: float(inside_F[place]) - mined.telling[place].others for place in range(len(inside_F))}
    own = [place for place in lead if inside_F[place] >= 0.5]
    best = max((lead[place] for place in own), default=0.0) - 0.1

    def rank(place: int) -> tuple[bool, int, float]:
        phrase = mined.telling[place].trait.phrase
        kind = 0 if phrase is None else 1 if says_something(phrase) else 2
        return lead[place] < best, kind, -lead[place]

    return [mined.telling[place] for place in sorted(own, key=rank)]


def cluster_rows(history: History, mined: Mined) -> list[dict[str, Any]]:
    rows = []
    for number in range(int(mined.cluster.max(initial=-1)) + 1):
        members = mined.rows[mined.cluster == number].tolist()
        names = [one.trait.name for one in of_cluster(mined, number)]
        examples = [
            {
                "prompt_id": history.records[row].prompt_id,
                "response_id": history.records[row].response_id,
                "prompt": history.records[row].prompt,
                "response": history.records[row].response,
                "gold": json_number(history.table.reward_B[row]),
                "proxy": json_number(history.proxy.reward_B[row]),
            }
            for row in members[:EXAMPLES]
        ]
        name = ", ".join(names[:_NAMED_BY]) or "no trait that half of them share"
        rows.append({"name": name, "rollouts": len(members), "traits": names[:TRAITS_TOLD], "examples": examples})
    return rows


def veto_row(veto: Veto, reason: str | None, answered_by: str) -> dict[str, Any]:
    return {
        "id": veto.id,
        "text": veto.text,
        "verifier": veto.verifier and veto.verifier.model_dump(),
        "source": veto.source,
        "cluster": veto.cluster,
        "answered_by": answered_by,
        "accepted": reason is None,
        "reason": reason,
    }


def print_report(report: dict[str, Any], folder: Path) -> None:
    accepted = [row for row in report["vetoes"] if row["accepted"]]
    changes = [
        f"{name.replace('_', ' ')} {shown(one['before']['value'])} → {shown(one['after']['value'])}"
        for name, one in report["history"].items()
        if "before" in one
    ]
    told = [report["note"] or ""]
    told += [
        f"cluster {number}: {row['rollouts']} that share: {row['name']}"
        for number, row in enumerate(report["clusters"])
    ]
    told += (
        [f"with the vetoes, on the half of the prompts that nothing was chosen by: {', '.join(changes)}"]
        if accepted
        else []
    )
    told += [
        f"rubrics with vetoes: {folder / PROMPTS} ({report['prompts_extended']} prompts)",
        f"report: {folder / REPORT}",
    ]
    print_table(
        f"{report['exploiting']} of {report['rollouts']} rollouts exploit; {len(accepted)} of {len(report['vetoes'])} "
        "vetoes are taken",
        ("veto", "cluster", "caught", "false alarm", "gold of those hit", ""),
        [
            (
                row["text"],
                str(row["cluster"]) if row["cluster"] >= 0 else "–",
                shown(row["judged_on"]["recall"]["value"]),
                shown(row["judged_on"]["false_alarm"]["value"]),
                shown((row["gold_effect"] or {}).get("value"), signed=True),
                "taken" if row["accepted"] else row["reason"].partition(":")[0],
            )
            for row in sorted(report["vetoes"], key=lambda row: not row["accepted"])
        ],
        "\n".join(filter(None, told)),
    )
