"""Programmatic checks by name, and the judge that answers criteria with them. Asks no model.

Two sorts of name: ``ifeval:...`` runs a checker of the if-verifiable library under its own name and arguments;
any other name is a check of this module, for what the library lacks. Left out of the library on purpose: checks
that need nltk's data files (sentence counts, counts of capital words) or guess a language, which is not
deterministic. An empty response meets nothing, not even "avoid ..." checks: silence is never rewarded.

A *word* is a run of letters, digits and underscores, as in the library ("e-mail" is two); words are compared
without case. A *sentence* ends at a line break, or at ``.``, ``!`` or ``?`` (with any closing quotes and brackets)
before white space. A full stop after a single letter or a title ("P.S.", "Dr.") ends nothing, a number at the
start of a line is a list marker, and a piece without a letter is no sentence. An unfinished last sentence counts.
"""

import difflib
import functools
import inspect
import json
import re
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import Annotated, Any, Literal, get_args, get_origin

from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from rubric_data.errors import UserError
from rubric_data.judges import JudgeRequest
from rubric_data.records import Criterion, JudgedResponse, Verdict, Verifier

LIBRARY = "ifeval:"
_LIBRARY_CHECKS = (
    "combination:repeat_prompt",
    "combination:two_responses",
    "detectable_content:number_placeholders",
    "detectable_content:postscript",
    "detectable_format:constrained_response",
    "detectable_format:json_format",
    "detectable_format:multiple_sections",
    "detectable_format:number_bullet_lists",
    "detectable_format:number_highlighted_sections",
    "detectable_format:title",
    "keywords:existence",
    "keywords:forbidden_words",
    "keywords:frequency",
    "keywords:letter_frequency",
    "length_constraints:nth_paragraph_first_word",
    "length_constraints:number_paragraphs",
    "length_constraints:number_words",
    "punctuation:no_comma",
    "startend:end_checker",
    "startend:quotation",
)
_VERSION = "1"  # of this module's checks: raise it when an answer may change, so that ledgers ask again

Count = Annotated[int, Field(ge=1, strict=True)]
Word = Annotated[str, Field(min_length=1, pattern=r"\S")]
Words = Annotated[list[Word], Field(min_length=1)]
Check = Callable[[str, str], bool]  # (response, prompt) -> met

_CLOSERS = "\"'”’»)]}*>"
_SENTENCE_END = re.compile(rf"[.!?…]+[{re.escape(_CLOSERS)}]*(?=\s|$)")
_LIST_MARKER = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")
_NO_END = frozenset({"mr", "mrs", "ms", "dr", "st", "vs", "prof"})
_FILLER = re.compile(
    r"(?:(?:absolutely|certainly|definitely|here are|here is|here's|i'd be happy|i'm happy|of course|sure)\b"
    r"|(?:alright|great|ok|okay|thank you|thanks|well)\s*[,.!:])",  # without the mark they may mean something
    re.IGNORECASE,
)
_FINE = (
    "amazing|astute|brilliant|bright|clever|excellent|exceptional|fantastic|fascinating|good|great|insightful|intelligent"
    "|interesting|lovely|outstanding|perceptive|sharp|smart|superb|terrific|thoughtful|wise|wonderful"
)
_FLATTERY = re.compile(
    rf"\b(?:{_FINE})\s+(?:idea|observation|point|prompt|question|request|topic)s?\b"
    r"|\byou(?:'re|’re| are| clearly| certainly| obviously| really| truly| have| must be)\b"
    rf"[^.!?]*\b(?:{_FINE}|genius)\b"
    rf"|\bonly an? (?:\w+ )?(?:{_FINE}) (?:person|mind|reader|student)\b|\b(?:somebody|someone|people) as (?:{_FINE})\b"
    r"|\b(?:delight|honou?r|pleasure|privilege) to (?:answer|assist|help)\b|\bimpressed (?:by|with)\b"
    r"|\b(?:admire|adore|love) (?:this|that|your|how you|the way you)\b",
    re.IGNORECASE,
)
_TEXT = r"(?:answer|article|essay|explanation|poem|reply|response|solution|story|summary|text)"
_PRAISING = r"(?:accurate|best|complete|comprehensive|correct|excellent|flawless|highest|ideal|perfect|thorough|well)"
_SELF_PRAISE = re.compile(
    rf"\b(?:this|my|the above)\s+(?:\w+\s+)?{_TEXT}\s+(?:is|has been)\s+(?:\w+\s+){{0,3}}?{_PRAISING}\b"
    rf"|\b(?:this|my|the above)\s+(?:\w+\s+)?{_TEXT}\s+(?:fully\s+)?"
    r"(?:fulfil|follow|meet|satisf|compl|cover|address)\w*\s+(?:with\s+)?"
    r"(?:all|each|every|the (?:criteria|requirements|rubric|request|instructions))\b"
    r"|\b(?:all|each|every)\s+(?:of\s+)?(?:the\s+|your\s+)?(?:criteri\w+|instructions?|requirements?)\s+(?:\w+\s+){0,3}?"
    r"(?:addressed|covered|followed|fulfilled|met|satisfied)\b"
    rf"|\bnothing is (?:missing|wrong)\b|\bnot find a better {_TEXT}\b",
    re.IGNORECASE,
)
_READER = frozenset({"you", "your", "yours", "yourself", "yourselves"})
_SELF = frozenset({"i", "me", "my", "mine", "myself"})


@functools.lru_cache(maxsize=4096)  # several checks read one response
def words_of(text: str) -> tuple[str, ...]:
    """The words of ``text``, case-folded, in order."""
    return tuple(word.casefold() for word in re.findall(r"\w+", text))


@functools.lru_cache(maxsize=4096)
def sentences_of(text: str) -> tuple[str, ...]:
    """The sentences of ``text`` without list markers, in order."""
    found: list[str] = []
    for line in text.splitlines():
        rest = _LIST_MARKER.sub("", line).strip()
        start = 0
        for end in _SENTENCE_END.finditer(rest):
            before = words_of(rest[start : end.start()])[-1:]
            is_short = bool(before) and (before[0] in _NO_END or (len(before[0]) == 1 and before[0].isalpha()))
            if is_short and end.group().startswith(".") and end.end() < len(rest):
                continue
            found.append(rest[start : end.end()].strip())
            start = end.end()
        found.append(rest[start:].strip())
    return tuple(sentence for sentence in found if any(letter.isalpha() for letter in sentence))


_CHECKS: dict[str, tuple[Callable[..., bool], type[BaseModel]]] = {}


def _check(function: Callable[..., bool]) -> Callable[..., bool]:
    """Register a check under its function's name; its keyword arguments are the verifier's."""
    parameters = inspect.signature(function).parameters.values()
    fields: dict[str, Any] = {
        parameter.name: (parameter.annotation, ... if parameter.default is parameter.empty else parameter.default)
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    arguments = create_model(function.__name__, __config__=ConfigDict(extra="forbid"), **fields)
    _CHECKS[function.__name__] = (function, arguments)
    return function


# ---- counting ----------------------------------------------------------------------------------------------------


@_check
def words(text: str, _: str, *, min: Count | None = None, max: Count | None = None) -> bool:
    """Between ``min`` and ``max`` words, both included; the library's own check takes one bound only."""
    count = len(words_of(text))
    return (min is None or min <= count) and (max is None or count <= max)


@_check
def sentences(text: str, _: str, *, min: Count = 1, max: Count | None = None) -> bool:
    """Between ``min`` and ``max`` sentences."""
    count = len(sentences_of(text))
    return min <= count and (max is None or count <= max)


@_check
def max_sentence_words(text: str, _: str, *, max: Count) -> bool:
    """No sentence has more than ``max`` words."""
    return all(len(words_of(sentence)) <= max for sentence in sentences_of(text))


@_check
def max_word_length(text: str, _: str, *, max: Count) -> bool:
    """No run of letters is longer than ``max``."""
    return all(len(word) <= max for word in re.findall(r"[^\W\d_]+", text))


@_check
def no_repeated_sentence(text: str, _: str) -> bool:
    """No two sentences have the same words in the same order."""
    found = [words_of(sentence) for sentence in sentences_of(text)]
    return len(set(found)) == len(found)


# ---- words -------------------------------------------------------------------------------------------------------


def _mentions(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


@_check
def mention_any(text: str, _: str, *, words: Words) -> bool:
    """At least one of ``words`` (or phrases) appears whole."""
    return any(_mentions(text, word) for word in words)


@_check
def mention_early(text: str, _: str, *, word: Word, within: Count) -> bool:
    """``word`` is one of the first ``within`` words."""
    return word.casefold() in words_of(text)[:within]


@_check
def no_copy(text: str, prompt: str, *, words: Count) -> bool:
    """No run of ``words`` words stands in the prompt as well."""
    return _runs(text, words).isdisjoint(_runs(prompt, words))


def _runs(text: str, length: int) -> set[tuple[str, ...]]:
    found = words_of(text)
    return {found[i : i + length] for i in range(len(found) - length + 1)}


@_check
def no_quote(text: str, _: str, *, texts: Words, words: Count) -> bool:
    """No run of ``words`` words stands in one of ``texts`` as well."""
    return not any(_runs(text, words) & _runs(other, words) for other in texts)


@_check
def no_phrase(text: str, _: str, *, phrases: Words, within: Count | None = None) -> bool:
    """None of ``phrases`` is a run of words of the text (of its first ``within`` words); case and marks aside."""
    found = words_of(text)[:within]
    for phrase in filter(None, map(words_of, phrases)):
        if any(found[place : place + len(phrase)] == phrase for place in range(len(found) - len(phrase) + 1)):
            return False
    return True


@_check
def addresses_reader(text: str, _: str) -> bool:
    """Says "you", "your", "yours" or "yourself"."""
    return not _READER.isdisjoint(words_of(text))


@_check
def addresses_nobody(text: str, _: str) -> bool:
    """The opposite of ``addresses_reader``."""
    return _READER.isdisjoint(words_of(text))


@_check
def first_person(text: str, _: str) -> bool:
    """Says "I", "me", "my", "mine" or "myself"."""
    return not _SELF.isdisjoint(words_of(text))


@_check
def no_first_person(text: str, _: str) -> bool:
    """The opposite of ``first_person``."""
    return _SELF.isdisjoint(words_of(text))


# ---- beginning and end -------------------------------------------------------------------------------------------


@_check
def starts_with(text: str, _: str, *, words: Words) -> bool:
    """The text begins with one of ``words`` (or phrases), whole; white space before it is ignored."""
    return any(re.match(rf"{re.escape(word)}(?!\w)", text.lstrip(), re.IGNORECASE) for word in words)


@_check
def opening_filler(text: str, _: str) -> bool:
    """The text begins with an empty opener: sure, certainly, of course, here is, well, thanks ..."""
    return _FILLER.match(text.lstrip(" \n\t\"'*")) is not None


@_check
def opening_not_filler(text: str, _: str) -> bool:
    """The opposite of ``opening_filler``."""
    return not opening_filler(text, _)


@_check
def no_flattery(text: str, _: str) -> bool:
    """The first two sentences praise neither the reader nor the question, as far as patterns of words can tell."""
    return _FLATTERY.search(" ".join(sentences_of(text)[:2])) is None


@_check
def no_self_praise(text: str, _: str) -> bool:
    """The text does not call itself good, complete or up to what was asked, as far as patterns of words can tell."""
    return _SELF_PRAISE.search(text) is None


@_check
def ends_complete(text: str, _: str) -> bool:
    """The last character is ``.``, ``!`` or ``?``, closing quotes and brackets aside, and no bare list marker."""
    last = text.rstrip().splitlines()[-1].rstrip(_CLOSERS + " ")
    return last.endswith((".", "!", "?", "…")) and any(letter.isalpha() for letter in last)


# ---- marks and layout --------------------------------------------------------------------------------------------


@_check
def has_question(text: str, _: str) -> bool:
    """A question mark appears."""
    return "?" in text


@_check
def no_question(text: str, _: str) -> bool:
    """No question mark appears."""
    return "?" not in text


@_check
def has_exclamation(text: str, _: str) -> bool:
    """An exclamation mark appears."""
    return "!" in text


@_check
def no_exclamation(text: str, _: str) -> bool:
    """No exclamation mark appears."""
    return "!" not in text


@_check
def has_digit(text: str, _: str) -> bool:
    """A digit 0-9 appears."""
    return re.search(r"[0-9]", text) is not None


@_check
def no_digit(text: str, _: str) -> bool:
    """No digit 0-9 appears."""
    return re.search(r"[0-9]", text) is None


@_check
def lowercase(text: str, _: str) -> bool:
    """There are letters, and none is a capital."""
    return text.islower()


@_check
def numbered_list(text: str, _: str, *, items: Count) -> bool:
    """The lines that begin with a number and ``.`` or ``)`` are numbered 1, 2 ... ``items``, each with some text."""
    numbers = re.findall(r"^\s*(\d+)[.)][ \t]+\S", text, re.MULTILINE)
    return numbers == [str(number) for number in range(1, items + 1)]


@_check
def one_paragraph(text: str, _: str) -> bool:
    """There is no line break inside the text."""
    return len(text.strip().splitlines()) == 1


# ---- measures ----------------------------------------------------------------------------------------------------

Measure = Literal[
    "words", "bold", "capitals", "digits", "emoji", "exclamation_marks", "headings", "list_items", "repetition"
]
_BOLD = re.compile(r"\*\*(?=\S)[^*\n]+?(?<=\S)\*\*")
_DIGIT = re.compile(r"[0-9]")
_EMOJI = re.compile("[\u2600-\u27bf\U0001f300-\U0001faff]")
_HEADING = re.compile(r"^#{1,6}\s", re.MULTILINE)
_ITEM = re.compile(_LIST_MARKER.pattern, re.MULTILINE)
_REPEATED = 3  # words of a run


def _repetition(text: str) -> float:
    """Share of the runs of three words that stood in the text before."""
    found = words_of(text)
    runs = len(found) - _REPEATED + 1
    return 1 - len(_runs(text, _REPEATED)) / runs if runs > 0 else 0.0


def _capitals(text: str) -> float:
    """Share of the letters that are capitals."""
    letters = [letter for letter in text if letter.isalpha()]
    return sum(map(str.isupper, letters)) / len(letters) if letters else 0.0


_MEASURES: dict[Measure, Callable[[str], float]] = {
    "words": lambda text: len(words_of(text)),
    "bold": lambda text: len(_BOLD.findall(text)),
    "capitals": _capitals,
    "digits": lambda text: len(_DIGIT.findall(text)),
    "emoji": lambda text: len(_EMOJI.findall(text)),
    "exclamation_marks": lambda text: text.count("!"),
    "headings": lambda text: len(_HEADING.findall(text)),
    "list_items": lambda text: len(_ITEM.findall(text)),
    "repetition": _repetition,
}
MEASURES: tuple[Measure, ...] = get_args(Measure)


def measure(name: Measure, text: str) -> float:
    """What `at_most` compares: a number of things in ``text``, or for capitals and repetition a share in [0, 1]."""
    return float(_MEASURES[name](text))


@_check
def at_most(text: str, _: str, *, measure: Measure, max: Annotated[float, Field(ge=0, strict=True)]) -> bool:
    """``measure`` of the text is at most ``max``; capitals are a share of letters, repetition one of 3-word runs."""
    return _MEASURES[measure](text) <= max


# ---- by name -----------------------------------------------------------------------------------------------------


def check_names() -> list[str]:
    """Every name that a verifier may have, sorted."""
    return sorted([*_CHECKS, *(LIBRARY + name for name in _LIBRARY_CHECKS)])


def describe_checks() -> list[str]:
    """This module's checks, one a line: name, arguments as JSON types, meaning. For who has to choose among them."""
    lines = []
    for name, (function, arguments) in sorted(_CHECKS.items()):
        fields = arguments.model_fields.items()
        taken = ", ".join(f"{key}: {_type_in_words(field.annotation)}" for key, field in fields)
        meaning = (inspect.getdoc(function) or "").partition("\n")[0].partition(";")[0].replace("``", "")
        lines.append(f"{name}({taken}): {meaning}")
    return lines


def _type_in_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    text = str(hint)
    return "list of strings" if "list" in text else "number" if "int" in text or "float" in text else "string"


def verify(verifier: Verifier, response: str, prompt: str = "") -> float:
    """Whether ``response`` passes the named check: 1.0 or 0.0; an empty response passes none.

    Raises UserError on an unknown name or unfit arguments.
    """
    return float(prepare(verifier)(response, prompt))


def prepare(verifier: Verifier) -> Check:
    """The check as a function of (response, prompt), for who asks it many times. Raises UserError as `verify`."""
    test = _test(verifier.name, json.dumps(verifier.args, sort_keys=True))
    return lambda response, prompt: bool(response.strip()) and test(response, prompt)


@functools.lru_cache(maxsize=4096)
def _test(name: str, args_json: str) -> Check:
    """The check ready to run, emptiness aside. By text, as records are not hashable."""
    args = json.loads(args_json)
    if name in _CHECKS:
        function, arguments = _CHECKS[name]
        try:
            return functools.partial(_call, function, arguments(**args).model_dump())
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            known = ", ".join(arguments.model_fields) or "none"
            raise UserError(
                f"verifier {name!r}: argument {place!r}: {first['msg'].lower()}; it takes: {known}"
            ) from None
    if name.removeprefix(LIBRARY) in _LIBRARY_CHECKS and name.startswith(LIBRARY):
        return _library_test(name, args)
    near = difflib.get_close_matches(name, check_names(), n=3, cutoff=0.5)
    advice = f"did you mean {' or '.join(map(repr, near))}?" if near else "docs/data.md lists them"
    raise UserError(f"verifier {name!r}: no such check; {advice}")


def _call(function: Callable[..., bool], args: dict[str, Any], response: str, prompt: str) -> bool:
    return function(response, prompt, **args)


def _library_test(name: str, args: dict[str, Any]) -> Check:
    """A checker of the library with all its arguments given.

    The library draws an argument at random if it is missing or out of range, so what it settled on is compared
    with what was asked for.
    """
    checker = INSTRUCTION_DICT[name.removeprefix(LIBRARY)](name)
    wanted = checker.get_instruction_args_keys()
    if sorted(args) != sorted(wanted):
        raise UserError(
            f"verifier {name!r}: takes exactly the arguments {', '.join(wanted) or 'none'}, "
            f"got {', '.join(sorted(args)) or 'none'}; give them all"
        )
    try:
        checker.build_description(**args)
        settled = checker.get_instruction_args() or {}
        checker.check_following("a probe: keywords are regular expressions and may not compile")
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise UserError(f"verifier {name!r}: unfit arguments {args}: {error}; see the if-verifiable library") from None
    changed = [key for key in wanted if _plain(settled[key]) != _plain(args[key])]
    if changed:
        raise UserError(f"verifier {name!r}: argument {changed[0]!r} is out of range, got {args[changed[0]]!r}")
    return functools.partial(_follows, checker)


def _follows(checker: Any, response: str, _: str) -> bool:
    try:
        return bool(checker.check_following(response))
    except RecursionError:  # JSON nested too deeply to be read
        return False


def _plain(value: Any) -> Any:
    """An argument without the order, case and margins that the library normalises away."""
    if isinstance(value, list):
        return sorted(str(item) for item in value)
    return value.strip().lower() if isinstance(value, str) else value


def check_verifiers(records: Iterable[JudgedResponse]) -> None:
    """Raise UserError at the first criterion whose verifier is unknown or misused."""
    for record in records:
        for criterion in record.rubric.criteria:
            try:
                if criterion.verifier is not None:
                    prepare(criterion.verifier)
            except UserError as error:
                raise UserError(f"response {record.response_id!r}, criterion {criterion.id!r}: {error}") from None


class VerifierJudge:
    """A judge that answers by programmatic checks; a criterion without one is masked ("no_verifier")."""

    name = "verifier"
    template = f"checks-{_VERSION}/if-verifiable-{version('if-verifiable')}"

    def judge(self, requests: Sequence[JudgeRequest]) -> list[tuple[Verdict, ...]]:
        """One tuple of verdicts for each request. Raises UserError if a verifier is unknown or misused."""
        return [tuple(self._answer(criterion, request) for criterion in request.criteria) for request in requests]

    def _answer(self, criterion: Criterion, request: JudgeRequest) -> Verdict:
        if criterion.verifier is None:
            reason = "no_verifier: the criterion names no programmatic check"
            return Verdict(criterion_id=criterion.id, masked=reason, judge=self.name)
        try:
            value = verify(criterion.verifier, request.response, request.prompt)
        except UserError as error:
            raise UserError(f"criterion {criterion.id!r}: {error}") from None
        return Verdict(criterion_id=criterion.id, value=value, judge=self.name)
