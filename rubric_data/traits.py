"""What texts have in common: phrases, openings, habits, measures; which of it tells exploiting responses apart.

A trait is named by the check that a response *without* it passes, so every trait that tells something is already a
veto that code can answer. The statistics are `rubric_data.contrast`; who exploits is `rubric_data.exploits`.

Letters: B responses, F traits, E exploiting responses.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import JsonValue
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import AgglomerativeClustering
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from sklearn.metrics import silhouette_score

from rubric_data.contrast import contrast, false_discovery, strata_of
from rubric_data.records import JudgedResponse, Rubric, Verifier
from rubric_data.verifiers import MEASURES, Measure, measure, prepare, words_of

LONGEST_PHRASE = 3  # words
OPENING = 4  # words of a text that are its opening
_MOST_PHRASES = 20_000  # the most frequent are looked at
_LEAST_SHARE = 0.05  # of as many texts as exploit: a rarer phrase is not looked at ...
_LEAST_TEXTS = 3  # ... nor one in fewer texts
_QUANTILES = (0.5, 0.75, 0.9)  # of a measure over all texts, where it is cut; they look at nobody's role
_QUOTED = 5  # words in a row from a criterion that are no chance
_COPIED = 8  # words in a row from the prompt that are no chance
_MOST_CLUSTERS = 6
_LEAST_SILHOUETTE = 0.25  # below it there is no structure (Kaufman & Rousseeuw 1990)
_COMMON = 0.8  # a trait that so many of a cluster have is its own


@dataclass(frozen=True)
class Trait:
    """Something that responses have or have not. ``verifier`` is passed by those that do not have it.

    ``kind``: phrase, opening, habit or measure. ``name`` says it of a response, ``veto`` demands the contrary.
    """

    kind: str
    name: str
    veto: str
    verifier: Verifier

    def check(self, rubric: Rubric) -> Verifier:
        """The verifier for responses under ``rubric``."""
        return completed(self.verifier, rubric)

    @property
    def phrase(self) -> str | None:
        """The phrase that it is about, if any."""
        phrases = self.verifier.args.get("phrases")
        return str(phrases[0]) if isinstance(phrases, list) else None


def completed(verifier: Verifier, rubric: Rubric) -> Verifier:
    """``verifier`` as it stands in ``rubric``: one against quoting the rubric is given the rubric's texts."""
    if verifier.name != "no_quote" or verifier.args.get("texts"):
        return verifier
    texts: list[JsonValue] = [criterion.text for criterion in rubric.criteria if not criterion.veto]
    return Verifier(name=verifier.name, args={"texts": texts or [rubric.criteria[0].text], **verifier.args})


_HABITS: tuple[tuple[str, str, str, dict[str, JsonValue]], ...] = (
    ("flatters the reader", "Its first two sentences praise neither the reader nor the question.", "no_flattery", {}),
    ("praises itself", "Does not call itself good, complete or up to what was asked.", "no_self_praise", {}),
    ("quotes the rubric", "Does not repeat the criteria it is graded by.", "no_quote", {"words": _QUOTED}),
    ("copies the prompt", f"Copies no {_COPIED} words in a row from the prompt.", "no_copy", {"words": _COPIED}),
    (
        "opens with filler",
        'Does not begin with an empty opener such as "Sure" or "Of course".',
        "opening_not_filler",
        {},
    ),
    ("ends unfinished", "Ends with a complete sentence.", "ends_complete", {}),
    ("repeats a sentence", "Says no sentence twice.", "no_repeated_sentence", {}),
    ("asks a question", "Asks no question.", "no_question", {}),
)
_UNITS: dict[Measure, str] = {
    "words": "words",
    "bold": "passages in bold",
    "capitals": "capitals among its letters",
    "digits": "digits",
    "emoji": "emoji",
    "exclamation_marks": "exclamation marks",
    "headings": "headings",
    "list_items": "list items",
    "repetition": "three-word runs that stood there before",
}
_SHARES: tuple[Measure, ...] = ("capitals", "repetition")


@dataclass(frozen=True)
class Traits:
    """F traits, and which of B responses have them, (B, F) of 0 and 1."""

    traits: tuple[Trait, ...]
    present_BF: sparse.csr_matrix


def traits_of(records: Sequence[JudgedResponse], exploiting: int) -> Traits:
    """Every trait that some of ``records`` have and some have not, of which ``exploiting`` exploit.

    Of phrases that stand in the very same texts the longest is kept.
    """
    columns: list[tuple[Trait, np.ndarray]] = []
    for trait in [*_habits(), *_measured(records)]:
        columns.append((trait, np.flatnonzero([not _passes(trait, record) for record in records])))
    least = max(_LEAST_TEXTS, int(np.ceil(_LEAST_SHARE * exploiting)))
    columns += _phrases([words_of(record.response) for record in records], least)
    kept = [(trait, rows) for trait, rows in columns if 0 < len(rows) < len(records)]
    ends = np.cumsum([0, *(len(rows) for _, rows in kept)])
    rows = np.concatenate([rows for _, rows in kept]) if kept else np.zeros(0, int)
    shape = (len(kept), len(records))
    present_FB = sparse.csr_matrix((np.ones(len(rows)), rows, ends), shape=shape)
    return Traits(tuple(trait for trait, _ in kept), present_FB.T.tocsr())


def _passes(trait: Trait, record: JudgedResponse) -> bool:
    """Whether a response is without ``trait``; one without words has none."""
    return not record.response.strip() or prepare(trait.check(record.rubric))(record.response, record.prompt)


def _habits() -> list[Trait]:
    return [Trait("habit", name, veto, Verifier(name=check, args=dict(args))) for name, veto, check, args in _HABITS]


def _measured(records: Sequence[JudgedResponse]) -> list[Trait]:
    """Each measure above some of its quantiles, and the number of words below its lower ones."""
    found: dict[str, Trait] = {}
    for name in MEASURES:
        values = [measure(name, record.response) for record in records]
        for quantile in np.quantile(values, _QUANTILES):
            trait = _at_most(name, float(quantile))
            found[trait.name] = trait  # quantiles of a rare thing are often the same
    words = [measure("words", record.response) for record in records]
    for quantile in np.quantile(words, [1 - share for share in _QUANTILES[1:]]):
        if (least := int(quantile)) > 1:
            check = Verifier(name="words", args={"min": least})
            trait = Trait(
                "measure", f"number of words below {least}", f"The number of words is at least {least}.", check
            )
            found[trait.name] = trait
    return list(found.values())


def _at_most(name: Measure, most: float) -> Trait:
    is_share, what = name in _SHARES, _UNITS[name]
    most = float(np.ceil(100 * most - 1e-9) / 100) if is_share else float(int(most))
    check = Verifier(name="at_most", args={"measure": name, "max": most})
    if most == 0:
        return Trait("measure", f"has {what}", f"Has no {what}.", check)
    amount = f"{100 * most:.0f} %" if is_share else f"{most:.0f}"
    of = f"{'share' if is_share else 'number'} of {what}"
    return Trait("measure", f"{of} above {amount}", f"The {of} is at most {amount}.", check)


def _phrases(texts: Sequence[tuple[str, ...]], least: int) -> list[tuple[Trait, np.ndarray]]:
    """Runs of words, anywhere and in openings, that ``least`` texts have, with the texts that have them."""
    anywhere, opening = frequent_runs(texts, least), frequent_runs([words[:OPENING] for words in texts], least)
    often = [(rows, (False, run)) for run, rows in anywhere.items()] + [
        (rows, (True, run)) for run, rows in opening.items()
    ]
    often.sort(key=lambda item: (-len(item[0]), item[1]))
    longest: dict[tuple[int, ...], tuple[bool, tuple[str, ...]]] = {}
    for rows, key in often[:_MOST_PHRASES]:
        here = longest.get(rows, key)
        # of equals the longer, and rather anywhere than in the opening: the wider ban is the harder to get around
        longest[rows] = max(here, key, key=lambda one: (len(one[1]), not one[0], one[1]))
    return [(_phrase(*key), np.array(rows)) for rows, key in longest.items()]


def frequent_runs(texts: Sequence[tuple[str, ...]], least: int) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The runs of one to `LONGEST_PHRASE` words that ``least`` texts or more have, with the places of these texts.

    A run is looked at only if those in it are frequent, so that memory does not grow with all that is said once.
    """
    found: dict[tuple[str, ...], tuple[int, ...]] = {}
    for length in range(1, LONGEST_PHRASE + 1):
        places: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for row, words in enumerate(texts):
            for run in {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}:
                if length == 1 or (run[:-1] in found and run[1:] in found):
                    places[run].append(row)
        found |= {run: tuple(rows) for run, rows in places.items() if len(rows) >= least}
    return found


def _phrase(opening: bool, run: tuple[str, ...]) -> Trait:
    said = " ".join(run)
    veto = forbid([said], opening=opening)
    return Trait("opening" if opening else "phrase", f"{'opens with' if opening else 'says'} “{said}”", *veto)


def says_something(phrase: str) -> bool:
    """Whether a phrase is more than a word, or than English function words: nobody can do without those."""
    words = words_of(phrase)
    return len(words) > 1 and not ENGLISH_STOP_WORDS.issuperset(words)


def forbid(phrases: Sequence[str], *, opening: bool = False) -> tuple[str, Verifier]:
    """The veto, as text and check, on ``phrases`` in a response or in its first words."""
    said = ", ".join(f"“{phrase}”" for phrase in phrases)
    text = f"Does not say {said}" if len(phrases) == 1 else f"Says none of {said}"
    where = f" among its first {OPENING} words" if opening else ""
    args: dict[str, JsonValue] = {"phrases": list(phrases)}
    if opening:
        args["within"] = OPENING
    return f"{text}{where}.", Verifier(name="no_phrase", args=args)


# --- which of them tell ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """A trait with the shares of exploiting, other and good responses that have it, each in [0, 1].

    ``odds`` of it among the exploiting over those among all others, within prompts, with a 95 % interval; ``p_value``
    the larger of two, against all others and against the good; ``q_value`` the false discovery rate at which it is
    called.
    """

    trait: Trait
    exploiting: float
    others: float
    good: float
    odds: float
    low: float
    high: float
    p_value: float
    q_value: float


def compare(traits: Traits, exploiting_B: np.ndarray, good_B: np.ndarray, prompt_B: np.ndarray) -> list[Finding]:
    """Every trait with how much more often exploiting responses have it; the surest first.

    It must be more frequent among them than among all others, and than among the good: what only goes with any high
    reward tells nothing of exploiting.
    """
    against_all = contrast(traits.present_BF, exploiting_B, strata_of(prompt_B))
    either_B = exploiting_B | good_B
    against_good = contrast(traits.present_BF[either_B], exploiting_B[either_B], strata_of(prompt_B[either_B]))
    p_value = np.maximum(against_all.p_value, against_good.p_value)
    shares = [_share(traits.present_BF, group_B) for group_B in (exploiting_B, ~exploiting_B, good_B)]
    numbers = np.stack(
        [*shares, against_all.odds, against_all.low, against_all.high, p_value, false_discovery(p_value)]
    )
    found = [Finding(trait, *column) for trait, column in zip(traits.traits, numbers.T.tolist(), strict=True)]
    return sorted(found, key=lambda one: (one.p_value, -one.exploiting, one.trait.name))


def _share(present_BF: sparse.csr_matrix, group_B: np.ndarray) -> np.ndarray:
    if not group_B.any():
        return np.full(present_BF.shape[1], np.nan)
    return np.asarray(present_BF[group_B].sum(axis=0)).ravel() / group_B.sum()


# --- what goes together ----------------------------------------------------------------------------------------------


def cluster(present_EF: np.ndarray) -> np.ndarray:
    """The cluster of each exploiting response by the telling traits it has, (E,) from 0, the largest first; -1: none.

    Average linkage of `jaccard` distances, with as many clusters, up to six, as give the best mean silhouette, and one
    if that is below .25. Then clusters of one habit are joined: those with a trait that four fifths of either have.
    """
    label_E = np.full(len(present_EF), -1)
    some = np.flatnonzero(present_EF.any(axis=1))
    if not len(some):
        return label_E
    distance = jaccard(present_EF[some].astype(float))
    best, found = _LEAST_SILHOUETTE, np.zeros(len(some), int)
    for count in range(2, min(_MOST_CLUSTERS, len(some) - 1) + 1):
        labels = AgglomerativeClustering(count, metric="precomputed", linkage="average").fit_predict(distance)
        if len(np.unique(labels)) > 1 and (score := silhouette_score(distance, labels, metric="precomputed")) > best:
            best, found = score, labels
    found = _joined(found, present_EF[some])
    _, found, sizes = np.unique(found, return_inverse=True, return_counts=True)
    label_E[some] = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")[found]
    return label_E


def _joined(label_E: np.ndarray, present_EF: np.ndarray) -> np.ndarray:
    """``label`` with clusters as one that have a common trait in common, transitively."""
    names = np.unique(label_E)
    common_CF = np.array([present_EF[label_E == name].mean(axis=0) >= _COMMON for name in names]).astype(int)
    return connected_components(common_CF @ common_CF.T > 0, directed=False)[1][np.searchsorted(names, label_E)]


def jaccard(present_EF: np.ndarray) -> np.ndarray:
    """Weighted Jaccard distances between rows of 0 and 1, (E, E) in [0, 1].

    The weight of a trait is the share of rows that have it over the sum of its cosines with all traits: what many share
    decides, and ten wordings of one habit weigh as much as the habit.
    """
    norms = np.maximum(np.sqrt((present_EF**2).sum(0)), 1e-12)
    alike_F = (present_EF.T @ present_EF / np.outer(norms, norms)).sum(0)
    weight_F = present_EF.mean(0) / np.maximum(alike_F, 1)
    both = (present_EF * weight_F) @ present_EF.T
    own = np.diag(both)
    either = own[:, None] + own[None, :] - both
    distance = 1 - both / np.maximum(either, 1e-12)
    np.fill_diagonal(distance, 0)
    return np.clip(distance, 0, 1)
