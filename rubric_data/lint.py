"""What is wrong with a rubric, by rules: each finding with its reason. Asks no model.

The rules follow what *Chasing the Tail* (arXiv:2509.21500) asks of a criterion: one demand, complete in itself, decided
without looking anything up, yes = good; and of a rubric: no overlap, weights that say something, a sensible number,
about half of the criteria failed. Rules by words are made to be right when they speak, not to find everything.
"""

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rubric_data.config import LintConfig
from rubric_data.errors import UserError
from rubric_data.files import write_json
from rubric_data.io import load_prompts
from rubric_data.programmatic import load_verdicts
from rubric_data.records import Criterion, JudgedResponse, PromptRecord, Rubric

Severity = Literal["error", "warning"]
Similarity = Callable[[Sequence[str]], np.ndarray]  # (K,) texts -> (K, K), 1 for equal texts
FEWEST, MOST = 3, 30  # criteria of a rubric
EASY, HARD = 0.9, 0.1  # beyond these shares of responses that meet it, a criterion tells little apart
MIN_VERDICTS = 5  # on a criterion: fewer say nothing about its share
_SAME = 0.97  # so similar, two criteria are one
_SHOWN = 200  # findings in the table; the output file has all


@dataclass(frozen=True)
class Finding:
    """One thing wrong. ``criterion_id`` is None where the whole rubric is meant.

    An "error" makes a rubric unfit for grading (`rubric refine` refuses to add one), a "warning" makes it worse.
    """

    prompt_id: str
    criterion_id: str | None
    rule: str
    severity: Severity
    message: str


# --- rules by words --------------------------------------------------------------------------------------------------

_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|‘[^’]*’|`[^`]*`|\([^)]*\)|(?<!\w)'[^']*'(?!\w)")
# what a criterion asks of a response, in the third person ("mentions") and after "does it" ("mention")
_VERBS = (
    r"acknowledg(?:es?|ing)|advis(?:es?)|apologi[sz]es?|asks?|avoids?|compares?|concludes?|contains?|defines?"
    r"|demonstrates?|describes?|discuss(?:es)?|explains?|expresses|gives?|identif(?:y|ies)|illustrates?|includes?"
    r"|mentions?|provides?|recommends?|refers|remains|specif(?:y|ies)|suggests?|summari[sz]es?|tells?|warns?"
)
_NOUNS_TOO = "addresses|answers|cites|contrasts|ends|keeps|lists|names|notes|offers|shows|starts|states|stays|uses"
_AN_OBJECT = r"(?=\s+(?:an?|the|at|in|on|to|with|that|what|why|how|exactly|only|no|each|every|its|both|\d|\W*QUOTE)\b)"
_SECOND_DEMAND = re.compile(
    rf"(?:\b(?:and|as well as|while also|and also|and then)|;)\s+(?:(?:also|it|does|clearly|correctly|briefly)\s+)*"
    rf"(?:(?:{_VERBS})\b(?!\s+of\b)|(?:{_NOUNS_TOO})\b{_AN_OBJECT})",
    re.IGNORECASE,
)
_AND_OR = re.compile(r"\band\s*/\s*or\b", re.IGNORECASE)
_ELSEWHERE = re.compile(
    r"\b(?:the|a|your) (?:reference|gold|model|ideal|sample|expert) (?:answer|response|solution)s?\b"
    r"|\bthe reference(?=[.,;?!]|$| (?:says|does|gives|has|mentions|is)\b)"
    r"|\b(?:the|any|an)\s?(?:other|first|second|former|latter|better|worse|winning|losing) (?:response|answer)s?\b"
    r"|\b(?:both|these two|the two) (?:answers|responses)(?=\s*(?:[.,;?!]|$))"
    r"|\b(?:as|listed|mentioned|described|stated|noted|given) above\b|\bthe above\b|\babove[- ]mentioned\b"
    r"|\b(?:previous|preceding|above|following|next|other) (?:criterion|criteria)\b|\bcriterion \d+\b",
    re.IGNORECASE,
)
_LETTERED = re.compile(r"\b[Rr]esponse (?:[AB]\b|[12]\b)")  # "response a" is a typing error, "Response A" a reference
_NOT_CURRENT = r"in|through|of|flow\w*|is|are|and|or|runs?|that|which|from|to|at|on|carries|moves|tense|stops"
_TIMELY = re.compile(
    r"\b(?:currently|up[- ]to[- ]date|most recent(?:ly)?|as of (?:today|now)|nowadays|today's|this year's)\b"
    r"|(?<!at )\b(?:the|its|their|their own) latest\b|\blatest (?:version|news|research|data|figures?|prices?)\b"
    rf"|\b(?:the|its|their) current (?!(?:{_NOT_CURRENT})\b)\w+",
    re.IGNORECASE,
)
_SOURCES = re.compile(
    r"\b(?:reputable|credible|reliable|authoritative|trustworthy|peer[- ]reviewed|official|existing|real)\s+"
    r"(?:\w+\s+)?(?:sources?|stud(?:y|ies)|references?|journals?|papers?|citations?)\b"
    r"|\b(?:working|valid|live) (?:links?|urls?|dois?)\b|\bfactually (?:correct|accurate|true)\b|\bfact-check\w*\b"
    r"|\bis (?:factual|historically accurate|scientifically accurate)\b",
    re.IGNORECASE,
)
_UNTOLD = re.compile(
    r"\b(?:correct|right|accurate|actual|exact|true) (?:\w+ )?(?:address|amount|author|capital|date|definition|figure|"
    r"formula|location|name|number|origin|population|price|statistic|temperature|translation|value|year)s?\b(?P<rest>.*)",
    re.IGNORECASE,
)
_TOLD = re.compile(r"\d|QUOTE|:|=|\bnamely\b|\bi\.e\.|\bsuch as\b|\b(?:is|as|was) [A-Z]|, [A-Z]")
_UNMET = re.compile(
    r"^(?:(?:the|this) (?:response|answer|text) )?(?:fails?|failing|lacks?|lacking|misses|omits?|neglects?|ignores?|"
    r"forgets?|misstates?|misrepresents?|contains? (?:factual )?(?:errors?|mistakes?|inaccuracies)|"
    r"(?:does not|doesn't|did not) (?:answer|address(?! the (?:reader|user))|explain|"
    r"acknowledge|clarify|justify))\b",
    re.IGNORECASE,
)
_PRAISE = re.compile(
    r"^(?:(?:the|this) (?:response|answer|text) )?(?:is (?:clear|correct|accurate|helpful|concise|polite|complete|"
    r"well\b)|(?:correctly|accurately|clearly|politely|thoroughly) \w+|avoids?|refrains? from|is free (?:of|from)|"
    r"stays? clear of|steers? clear of)\b",
    re.IGNORECASE,
)
_VAGUE = re.compile(
    r"\b(?:(?:in)?appropriate(?:ly)?|adequate(?:ly)?|high[- ]quality|good quality|properly|effectively|helpful"
    r"|well[- ](?:written|structured|crafted)|comprehensive(?:ly)?|thorough(?:ly)?|reasonabl[ey](?! doubt)"
    r"|engaging(?! in\b| with\b)"
    r"|sufficient(?:ly)? (?:detail(?:ed|s)?|depth|information|clear|context|explanation|evidence)"
    r"|(?:is|are) (?:good|nice|clear|accurate|correct|relevant|interesting)(?=\s*(?:[.,;?!]|$| and\b| enough\b))"
    r"|as needed|and so on)\b|\betc\b",
    re.IGNORECASE,
)
_SPELT_OUT = re.compile(r"QUOTE|:|\bi\.e\.|\be\.g\.|\bby \w+ing\b|\bsuch as\b|\bthat is\b")
# quoted without quotation marks
_NAMED_WORD = re.compile(r"\b(?:words?|phrases?|letters?) (\w+)", re.IGNORECASE)
_NEGATION = re.compile(r"\b(?:no|not|never|none|without|avoids?|\w+n't|free of|refrains?)\b", re.IGNORECASE)


def lint_criterion(criterion: Criterion) -> list[tuple[str, Severity, str]]:
    """Rule, severity and reason of everything that is wrong with ``criterion`` by itself."""
    text = _QUOTED.sub(" QUOTE ", criterion.text)  # what stands in quotation marks is what a response must say
    found: list[tuple[str, Severity, str]] = []

    def add(rule: str, severity: Severity, reason: str) -> None:
        found.append((rule, severity, reason))

    match = _SECOND_DEMAND.search(text)
    if match and len(text[: match.start()].split()) > 1:  # "begins and ends with ..." shares what follows
        add("atomic", "warning", f"two demands, joined by {_said(match)}: make it two criteria")
    elif match := _AND_OR.search(text):
        add("atomic", "warning", f"{_said(match)}: say whether one is enough")
    if match := _ELSEWHERE.search(text) or _LETTERED.search(text):
        add(
            "self-contained",
            "error",
            f"{_said(match)}: a grader sees one response and nothing else; name what is meant",
        )
    if match := _TIMELY.search(text):
        add("search", "warning", f"{_said(match)} changes with time: name the fact")
    elif match := _SOURCES.search(text):
        add("search", "warning", f"{_said(match)} cannot be told without looking it up: name the fact or the source")
    elif (match := _UNTOLD.search(text)) and not _TOLD.search(match["rest"]):
        what = match[0].removesuffix(match["rest"])
        add("search", "warning", f"'{what}' is not given, so it would have to be looked up: name it")
    if criterion.weight > 0 and (match := _UNMET.search(text)):
        add("polarity", "warning", f"{_said(match)} with a positive weight rewards a fault: turn it round")
    if criterion.weight < 0 and (match := _PRAISE.search(text)):
        add("polarity", "warning", f"{_said(match)} with a negative weight punishes a merit: turn it round")
    if (match := _VAGUE.search(text)) and not _SPELT_OUT.search(text):
        add("vague", "warning", f"{_said(match)} means something else to every grader: say what can be seen")
    return found


def _said(match: re.Match[str]) -> str:
    return f"'{' '.join(match[0].replace('QUOTE', '…').split())}'"


# --- rules for the whole rubric --------------------------------------------------------------------------------------


def lint_rubric(
    prompt_id: str,
    rubric: Rubric,
    *,
    similarity: np.ndarray | None = None,
    overlap: float = 0.8,
    max_weight: float = 3.0,
    by_words: bool = True,
) -> list[Finding]:
    """Every finding in ``rubric``, criterion by criterion, then on the whole.

    ``similarity``: (K, K) of the criteria, lexical if it is not given; pairs of at least ``overlap`` are reported.
    ``by_words``: two such criteria must also agree in their numbers, their negation and their content words, as
    similar sentences about different things are common; leave it out for embeddings, which know the difference.
    """
    criteria = rubric.criteria
    found = [Finding(prompt_id, c.id, *finding) for c in criteria for finding in lint_criterion(c)]
    if similarity is None:
        similarity = lexical_similarity([criterion.text for criterion in criteria])
    for first, second in zip(*np.nonzero(np.triu(similarity >= overlap, k=1)), strict=True):
        one, other = criteria[first], criteria[second]
        if by_words and not _same_demand(one.text, other.text):
            continue
        likeness = float(similarity[first, second])
        severity: Severity = "error" if likeness >= _SAME else "warning"
        message = f"asks for the same as {one.id} (similarity {likeness:.2f}): drop one, or say how they differ"
        found.append(Finding(prompt_id, other.id, "overlap", severity, message))
    return found + [Finding(prompt_id, *finding) for finding in _on_the_whole(criteria, max_weight)]


def _on_the_whole(criteria: Sequence[Criterion], max_weight: float) -> list[tuple[str | None, str, Severity, str]]:
    found: list[tuple[str | None, str, Severity, str]] = []
    for criterion in criteria:
        if not criterion.veto and not 1 <= abs(criterion.weight) <= max_weight:  # a veto takes away, whatever it weighs
            message = f"weight {criterion.weight:g} is off the scale of 1 to {max_weight:g}"
            found.append((criterion.id, "weights", "warning", message))
    if len(criteria) >= FEWEST and all(criterion.weight == max_weight for criterion in criteria):
        message = f"all {len(criteria)} weights are {max_weight:g}, so none matters more: use the scale"
        found.append((None, "weights", "warning", message))
    if not FEWEST <= len(criteria) <= MOST:
        few = "few criteria rank few responses" if len(criteria) < FEWEST else "many are hard to keep apart"
        found.append((None, "count", "warning", f"{len(criteria)} criteria; {few}: aim at {FEWEST} to {MOST}"))
    return found


def lexical_similarity(texts: Sequence[str]) -> np.ndarray:
    """Cosine of character n-gram counts, (K, K) in [0, 1]; n from 3 to 5 within words, case and punctuation aside."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = [" ".join(re.findall(r"\w+", text)) for text in texts]
    if not any(words):
        return np.eye(len(texts))
    # no inverse document frequency: whether two criteria are alike must not depend on the others
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), use_idf=False).fit_transform(words)
    return np.clip((vectors @ vectors.T).toarray(), 0.0, 1.0)


_EMPTY_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an the of in on at to for by as is are be it its that this with from and or response answer text reader "
        "does do should must has have",
    )
)


def _same_demand(one: str, other: str) -> bool:
    """Whether two similar sentences may ask for the same: no number, quotation, negation or word tells otherwise."""
    told_apart = (
        sorted(re.findall(r"\d+", one)) != sorted(re.findall(r"\d+", other))
        or sorted(_QUOTED.findall(one)) != sorted(_QUOTED.findall(other))
        or sorted(_NAMED_WORD.findall(one)) != sorted(_NAMED_WORD.findall(other))
        or bool(_NEGATION.search(one)) != bool(_NEGATION.search(other))
    )
    if told_apart:
        return False
    words = [[w for w in re.findall(r"\w+", text.lower()) if w not in _EMPTY_WORDS] for text in (one, other)]
    only_one, only_other = (_unmatched(*sides) for sides in (words, words[::-1]))
    return not (only_one and only_other)  # "mentions apples", "mentions pears": each has a word of its own


def _unmatched(words: Sequence[str], others: Sequence[str]) -> list[str]:
    """The words that stand in ``others`` in no form ("cause" in "causes")."""
    return [word for word in words if not difflib.get_close_matches(word, others, n=1, cutoff=0.75)]


# --- prompts and verdicts --------------------------------------------------------------------------------------------


def lint_prompts(
    prompts: Iterable[PromptRecord],
    *,
    overlap: float = 0.8,
    max_weight: float = 3.0,
    similarity: Similarity | None = None,
) -> list[Finding]:
    """Findings in the rubrics of ``prompts``, in their order; a prompt without a rubric has none.

    ``similarity`` compares criteria, for example by embeddings; without it they are compared by their letters.
    """
    return [
        finding
        for record in prompts
        if record.rubric is not None
        for finding in lint_rubric(
            record.prompt_id,
            record.rubric,
            similarity=similarity([c.text for c in record.rubric.criteria]) if similarity else None,
            overlap=overlap,
            max_weight=max_weight,
            by_words=similarity is None,
        )
    ]


def lint_verdicts(records: Iterable[JudgedResponse]) -> list[Finding]:
    """Criteria that nearly everybody or nearly nobody meets: outside [`HARD`, `EASY`] of a prompt's responses.

    The share is the mean verdict, masked ones left out; criteria with fewer than `MIN_VERDICTS` are not reported.
    """
    found = []
    for (prompt_id, criterion_id), answers in _answers(records).items():
        share = float(np.mean(answers))
        if len(answers) >= MIN_VERDICTS and not HARD <= share <= EASY:
            advice = "demand more" if share > EASY else "demand less, or drop it"
            message = f"met by {share:.0%} of {len(answers)} responses, so it tells few apart: {advice}"
            found.append(Finding(prompt_id, criterion_id, "pass-share", "warning", message))
    return found


def _answers(records: Iterable[JudgedResponse]) -> dict[tuple[str, str], list[float]]:
    """The values of verdicts by prompt and criterion, masked ones left out."""
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in records:
        for verdict in record.verdicts:
            if verdict.value is not None:
                values[record.prompt_id, verdict.criterion_id].append(verdict.value)
    return values


def run_lint(config: LintConfig) -> dict[str, Any]:
    """Lint the rubrics of ``config.data``; print the findings, return their counts. Raises UserError on bad input."""
    if not 0 < config.overlap <= 1:
        raise UserError(f"overlap: must be in (0, 1], got {config.overlap}; correct it")
    if not config.max_weight > 0:
        raise UserError(f"max_weight: must be positive, got {config.max_weight}; raise it")
    if config.output is not None and Path(config.output).exists():
        raise UserError(f"{config.output}: exists already; choose another --output")
    prompts = load_prompts(config.data)
    found = lint_prompts(prompts, overlap=config.overlap, max_weight=config.max_weight)
    shares = {}
    if config.verdicts is not None:
        judged = load_verdicts(config.verdicts)
        found += lint_verdicts(judged)
        answered = [len(answers) for answers in _answers(judged).values()]
        enough = sum(count >= MIN_VERDICTS for count in answered)
        shares = {"pass_share": {"looked_at": enough, "too_few_verdicts": len(answered) - enough}}
    rubrics = {record.prompt_id: record.rubric for record in prompts if record.rubric is not None}
    report = {
        "rubrics": len(rubrics),
        "criteria": sum(len(rubric.criteria) for rubric in rubrics.values()),
        "without_rubric": len(prompts) - len(rubrics),
        "findings": len(found),
        "by_rule": dict(Counter(finding.rule for finding in found).most_common()),
        **shares,
    }
    if config.output is not None:
        write_json(config.output, report | {"findings": [asdict(finding) for finding in found]})
    if found:
        Console().print(_table(found, rubrics))
    return report


def shown(text: str) -> str:
    """``text`` as one line that a terminal prints and does not obey."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(text.split()))


def _table(found: Sequence[Finding], rubrics: Mapping[str, Rubric]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title_justify="left")
    for title in ("prompt", "criterion", "rule", "why"):
        table.add_column(title, overflow="fold")
    for finding in found[:_SHOWN]:
        rubric = rubrics.get(finding.prompt_id)
        texts = {criterion.id: criterion.text for criterion in rubric.criteria} if rubric else {}
        named = finding.criterion_id or ""
        asked = f"{named}: {texts[named]}" if named in texts else named
        style = "bold" if finding.severity == "error" else ""
        cells = (finding.prompt_id, asked, finding.rule, finding.message)
        table.add_row(*(Text(shown(cell), style=style) for cell in cells))  # Text: models may write markup
    if len(found) > _SHOWN:
        table.caption = f"and {len(found) - _SHOWN} more; --output FILE.json has all"
    return table
