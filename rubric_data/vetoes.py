"""Vetoes against exploits: from what tells exploiting responses apart, and from a proposer; which of them are taken.

A veto is a criterion that honest responses meet and exploiting ones fail, and then earn nothing. Owns their wording,
ids and weight, and the rule by which history decides on them. Traits are `rubric_data.traits`, roles
`rubric_data.exploits`; who answers vetoes on history, and the numbers, is `rm.defence`.

Letters: B responses, V vetoes, C traits that tell.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rubric_data.records import Criterion, Rubric, Verifier, content_hash
from rubric_data.traits import Finding, completed, forbid, says_something

WEIGHT = 0.01  # a veto takes away; being met shall hardly pay
TAG = "veto"
TEMPLATE = "template"  # the source of a veto that no model proposed
_MOST_PHRASES = 8  # in one veto
_LEAST_GAIN = 0.05  # share of the exploiting responses that a further veto, or phrase, must be the first to catch
_MOST_TRAITS = 12  # habits and measures that are made vetoes of


@dataclass(frozen=True)
class Veto:
    """A veto that is considered.

    ``source`` is `TEMPLATE`, or who proposed it. ``cluster`` of exploiting responses it is against, -1 for none.
    """

    text: str
    verifier: Verifier | None
    source: str
    cluster: int

    @cached_property
    def id(self) -> str:
        """Of the criterion: the same for the same text and check, in whatever run and rubric."""
        return f"veto-{content_hash([self.text, self.verifier and self.verifier.model_dump()])[:8]}"

    def criterion(self, rubric: Rubric | None = None) -> Criterion:
        """The veto, as it stands in ``rubric`` if there is one."""
        verifier = completed(self.verifier, rubric) if self.verifier and rubric else self.verifier
        return Criterion(id=self.id, text=self.text, weight=WEIGHT, veto=True, tags=(TAG,), verifier=verifier)


def extended(rubric: Rubric, vetoes: Iterable[Veto]) -> Rubric:
    """``rubric`` with those of ``vetoes`` behind its criteria that it does not have yet."""
    there = {criterion.id for criterion in rubric.criteria}
    added = tuple(veto.criterion(rubric) for veto in vetoes if veto.id not in there)
    return Rubric(criteria=(*rubric.criteria, *added)) if added else rubric


# --- made of traits --------------------------------------------------------------------------------------------------


def from_traits(
    telling: Sequence[Finding],
    present_BC: np.ndarray,
    cluster_B: np.ndarray,
    good_B: np.ndarray,
    max_false_alarm: float,
) -> list[Veto]:
    """Vetoes that code answers: one on each of the surest habits and measures, and for each cluster one on phrases.

    ``present`` says which responses have the traits in ``telling``; ``cluster`` is that of exploiting responses, below
    0 of all others. None is made that would hit more than ``max_false_alarm`` of the ``good``, nor of phrases that say
    nothing by themselves.
    """
    most = max_false_alarm * good_B.sum()
    fit_C = present_BC[good_B].sum(axis=0) <= most
    found: list[Veto] = []
    for place, finding in enumerate(telling):
        if fit_C[place] and finding.trait.kind in ("habit", "measure") and len(found) < _MOST_TRAITS:
            of = cluster_B[present_BC[:, place] & (cluster_B >= 0)]
            against = int(np.bincount(of).argmax()) if len(of) else 0
            found.append(Veto(finding.trait.veto, finding.trait.verifier, TEMPLATE, against))
    for number in range(int(cluster_B.max(initial=-1)) + 1):
        for kind in ("phrase", "opening"):
            said = {
                place: one.trait.phrase
                for place, one in enumerate(telling)
                if fit_C[place] and one.trait.kind == kind and one.trait.phrase and says_something(one.trait.phrase)
            }
            chosen = _cover(present_BC[:, list(said)], cluster_B == number, good_B, most)
            if chosen:
                phrases = [list(said.values())[place] for place in chosen]
                text, verifier = forbid(phrases, opening=kind == "opening")
                found.append(Veto(text, verifier, TEMPLATE, number))
    return list({veto.id: veto for veto in found}.values())


def _cover(present_BC: np.ndarray, wanted_B: np.ndarray, good_B: np.ndarray, most: float) -> list[int]:
    """Places of traits that together most of ``wanted`` have and no more than ``most`` of the good; greedily."""
    chosen: list[int] = []
    hit_B = np.zeros(len(wanted_B), bool)
    while len(chosen) < _MOST_PHRASES and present_BC.shape[1]:
        gain_C = (present_BC[wanted_B & ~hit_B]).sum(axis=0)
        gain_C[(present_BC | hit_B[:, None])[good_B].sum(axis=0) > most] = 0
        best = int(gain_C.argmax())
        if gain_C[best] < max(2, _LEAST_GAIN * wanted_B.sum()):
            break
        chosen.append(best)
        hit_B |= present_BC[:, best]
    return chosen


# --- which are taken -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What a veto must do: catch ``min_recall`` of the exploiting and hit at most ``max_false_alarm`` of the good."""

    min_recall: float
    max_false_alarm: float


def hits(value_BV: np.ndarray) -> np.ndarray:
    """Which responses fail a veto, (B, V) bool, by its verdicts in [0, 1]; one without a verdict (NaN) does not."""
    return np.nan_to_num(value_BV, nan=1.0) < 0.5


def share(hit_B: np.ndarray, group_B: np.ndarray) -> float:
    """Share of the group that is hit; NaN of an empty group."""
    return float(hit_B[group_B].mean()) if group_B.any() else np.nan


def refusals(
    vetoes: Sequence[Veto],
    value_BV: np.ndarray,
    exploiting_B: np.ndarray,
    good_B: np.ndarray,
    chosen_B: np.ndarray,
    limits: Limits,
) -> list[str | None]:
    """Why each of ``vetoes`` is not taken, as "kind: detail"; None if it is. ``value``: verdicts on them.

    It must keep the ``limits`` on the half of the prompts that was chosen on (``chosen``) and again on the other half,
    which nothing was chosen by. Those that do are taken in the order of what they catch on the first half, those on
    phrases last, as a policy finds other words; each must be the first to catch some there, and all together keep to
    the false alarms on the second.
    """
    hit_BV = hits(value_BV)
    found: list[str | None] = [
        _beyond(value_BV[:, v], hit_BV[:, v], exploiting_B, good_B, chosen_B, limits) for v in range(hit_BV.shape[1])
    ]
    caught_V = hit_BV[exploiting_B & chosen_B].sum(axis=0)
    is_phrases = [veto.verifier is not None and veto.verifier.name == "no_phrase" for veto in vetoes]
    taken_B = np.zeros(len(hit_BV), bool)
    least = max(1.0, _LEAST_GAIN * (exploiting_B & chosen_B).sum())
    for v in sorted(range(len(found)), key=lambda v: (is_phrases[v], -caught_V[v], v)):
        if found[v] is not None:
            continue
        new = int((hit_BV[:, v] & ~taken_B & exploiting_B & chosen_B).sum())
        together = share(taken_B | hit_BV[:, v], good_B & ~chosen_B)
        if new < least:
            found[v] = f"redundant: the vetoes taken before it leave it {new} to catch"
        elif together > limits.max_false_alarm:
            found[v] = f"false_alarm: with those taken before it {together:.3f} of the good would be hit"
        else:
            taken_B |= hit_BV[:, v]
    return found


def _beyond(
    value_B: np.ndarray,
    hit_B: np.ndarray,
    exploiting_B: np.ndarray,
    good_B: np.ndarray,
    chosen_B: np.ndarray,
    limits: Limits,
) -> str | None:
    """Why a veto by itself is not good enough."""
    asked_B = exploiting_B | good_B
    if (unanswered := float(np.isnan(value_B[asked_B]).mean())) > 0.5:
        return f"unanswered: {unanswered:.0%} of the responses have no verdict on it"
    for half_B, name in ((chosen_B, "the half chosen on"), (~chosen_B, "the half judged on")):
        recall, alarm = share(hit_B, exploiting_B & half_B), share(hit_B, good_B & half_B)
        if not recall >= limits.min_recall:
            return f"low_recall: catches {recall:.3f} of the exploiting on {name}"
        if not alarm <= limits.max_false_alarm:
            return f"false_alarm: hits {alarm:.3f} of the good on {name}"
    return None
