"""The vocabulary of the embedded rubrics: every check in several wordings, as a criterion and as a request.

Owns the words; which checks make up a rubric is `rubric_data.builtin.recipe`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from rubric_data.records import Criterion, Verifier


@dataclass(frozen=True)
class Check:
    """A kind of check. Wordings and requests are format strings over the check's slots."""

    tag: str  # verifier family, the criterion's tag
    wordings: tuple[str, ...]  # how a criterion may say it
    requests: tuple[str, ...] = ()  # how a prompt may ask for it, after "Please ..."
    pitfall: bool = False


@dataclass(frozen=True)
class Choice:
    """One check with its slots filled: what the texts say, and the verifier that settles it."""

    check: str  # key of CHECKS
    verifier: Verifier
    slots: dict[str, Any] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        return CHECKS[self.check].tag

    def request(self, random: Random) -> str:
        """An imperative without a full stop, such as "use at most 30 words"."""
        return random.choice(CHECKS[self.check].requests).format(**self.slots)

    def criterion(self, number: int, weight: float, veto: bool, random: Random) -> Criterion:
        """The criterion in one of its wordings; a pitfall's weight is negative."""
        check = CHECKS[self.check]
        return Criterion(
            id=f"c{number}",
            text=random.choice(check.wordings).format(**self.slots),
            weight=-weight if check.pitfall else weight,
            veto=veto,
            tags=(check.tag,),
            verifier=self.verifier,
        )


CHECKS: dict[str, Check] = {
    "words_max": Check(
        "length",
        (
            "Uses at most {n} words.",
            "The answer is no longer than {n} words.",
            "Stays within {n} words.",
            "Has {n} words or fewer.",
        ),
        ("use at most {n} words", "stay within {n} words", "keep it to {n} words"),
    ),
    "words_min": Check(
        "length",
        (
            "Uses at least {n} words.",
            "The answer has {n} words or more.",
            "Is no shorter than {n} words.",
            "Gives a reply of at least {n} words.",
        ),
        ("use at least {n} words", "write {n} words or more"),
    ),
    "sentences_exact": Check(
        "sentences",
        (
            "Consists of exactly {n} sentence{s}.",
            "Has {n} sentence{s}, no more and no fewer.",
            "The number of sentences is {n}.",
            "Is made of just {n} sentence{s}.",
        ),
        ("answer in {n} sentence{s}", "write exactly {n} sentence{s}", "use {n} sentence{s}"),
    ),
    "sentences_max": Check(
        "sentences",
        (
            "Has at most {n} sentences.",
            "Says it in {n} sentences or fewer.",
            "There are no more than {n} sentences.",
        ),
        ("use at most {n} sentences", "write no more than {n} sentences"),
    ),
    "sentences_min": Check(
        "sentences",
        ("Has at least {n} sentences.", "Runs to {n} sentences or more.", "There are no fewer than {n} sentences."),
        ("write at least {n} sentences",),
    ),
    "short_sentences": Check(
        "sentences",
        (
            "No sentence is longer than {n} words.",
            "Every sentence has {n} words or fewer.",
            "Keeps each sentence within {n} words.",
        ),
    ),
    "complete": Check(
        "ending",
        (
            "Ends with a complete sentence.",
            "The last sentence is finished.",
            "Does not break off; it closes with a punctuation mark.",
            "The text stops after a full stop or like mark.",
        ),
    ),
    "ends_question": Check(
        "ending",
        (
            "Ends with a question.",
            "The last sentence is a question.",
            "Closes by asking something.",
            "The final mark is a question mark.",
        ),
        ("end with a question", "close with a question", "finish by asking a question"),
    ),
    "no_comma": Check(
        "comma",
        (
            "Contains no commas.",
            "Is written without any comma.",
            "Never uses a comma.",
            "There is not a single comma in the answer.",
        ),
        ("use no commas", "avoid commas", "write without commas"),
    ),
    "keyword": Check(
        "keyword",
        (
            "Mentions the word {word}.",
            "The word {word} appears in the answer.",
            "Makes use of the word {word}.",
            "Somewhere it says {word}.",
        ),
        ('mention "{word}"', 'use the word "{word}"', 'put in the word "{word}"'),
    ),
    "twice": Check(
        "keyword",
        (
            "Uses the word {word} at least twice.",
            "Says {word} two times or more.",
            "The word {word} occurs more than once.",
        ),
        ('use the word "{word}" twice',),
    ),
    "any_of": Check(
        "keyword",
        (
            "Mentions {first} or {second}.",
            "At least one of the words {first} and {second} appears.",
            "Contains the word {first} or the word {second}.",
        ),
        ('use "{first}" or "{second}"', 'mention "{first}" or "{second}"'),
    ),
    "both": Check(
        "keyword",
        (
            "Mentions both {first} and {second}.",
            "The words {first} and {second} both appear.",
            "Contains {first} as well as {second}.",
        ),
        ('mention "{first}" and "{second}"', 'use both "{first}" and "{second}"'),
    ),
    "avoid": Check(
        "avoid",
        (
            "Avoids the word {word}.",
            "Never uses the word {word}.",
            "The word {word} does not appear.",
            "Manages without the word {word}.",
        ),
        ('avoid the word "{word}"', 'do not use the word "{word}"', 'leave out the word "{word}"'),
    ),
    "starts_with": Check(
        "opening",
        (
            "Starts with the word {word}.",
            "The first word is {word}.",
            "Opens with the word {word}.",
            "Its very first word is {word}.",
        ),
        ('start with "{word}"', 'begin with the word "{word}"', 'open with "{word}"'),
    ),
    "names_early": Check(
        "opening",
        (
            "The word {word} is among the first {n} words.",
            "Names {word} within the first {n} words.",
            "Gets to {word} in its first {n} words.",
        ),
    ),
    "no_filler": Check(
        "opening",
        (
            "Gets to the point without a filler opening.",
            'Does not open with filler such as "Sure" or "Certainly".',
            "Begins directly, with no chatty opener.",
        ),
    ),
    "filler": Check(
        "opening",
        (
            'Opens with filler such as "Sure" or "Certainly".',
            "Starts with a chatty filler word.",
            'Begins with an empty opener like "Well" or "Of course".',
        ),
        pitfall=True,
    ),
    "bullets": Check(
        "format",
        (
            "Is a list of exactly {n} bullet points.",
            "Has {n} bullet points, no more and no fewer.",
            "The number of bullet points is {n}.",
            "Gives just {n} points marked with * or -.",
        ),
        ("use exactly {n} bullet points", "write {n} bullet points", "answer with {n} bullet points"),
    ),
    "numbered": Check(
        "format",
        (
            "Is a numbered list of {n} items.",
            "Has exactly {n} numbered items.",
            "Counts its items from 1 to {n}.",
        ),
        ("number the items from 1 to {n}", "write a numbered list of {n} items", "give {n} numbered steps"),
    ),
    "title": Check(
        "format",
        (
            "Has a title in double angular brackets.",
            "Carries a title such as <<The Title>>.",
            "A title stands between << and >>.",
        ),
        ("add a title like <<Title>>", "put a title in << and >>", "give it a title in << >>"),
    ),
    "json": Check(
        "format",
        (
            "The whole answer is valid JSON.",
            "Parses as JSON.",
            "Is a correct JSON value and nothing else.",
        ),
        ("answer in JSON", "reply with JSON only", 'give JSON with the one key "answer"'),
    ),
    "quoted": Check(
        "format",
        (
            "The whole answer stands in double quotation marks.",
            "Begins and ends with a double quotation mark.",
            "Is wrapped in double quotes.",
        ),
        ("put the answer in double quotes", "wrap it in double quotation marks", "place double quotes around it"),
    ),
    "postscript": Check(
        "format",
        ('Has a postscript that starts with "P.S.".', 'Adds a "P.S." line.', 'Contains a "P.S." at some point.'),
        ("add a P.S.", "include a P.S.", "write a P.S. as well"),
    ),
    "one_paragraph": Check(
        "format",
        (
            "Keeps to a single paragraph without line breaks.",
            "Is one block of text with no new lines.",
            "Everything stands on one line.",
        ),
        ("write one paragraph", "use a single paragraph"),
    ),
    "you": Check(
        "person",
        (
            'Speaks to the reader as "you".',
            'Addresses the reader with "you" or "your".',
            'The word "you" or "your" appears.',
        ),
        ('speak to the reader as "you"', "address the reader directly", 'use the word "you"'),
    ),
    "no_you": Check(
        "person",
        (
            'Does not address the reader as "you".',
            'Avoids the words "you" and "your".',
            'Neither "you" nor "your" appears.',
        ),
    ),
    "first_person": Check(
        "person",
        (
            "Is told in the first person.",
            'Uses "I" or "my".',
            'The writer says "I", "me" or "my".',
        ),
        ("write in the first person", 'use the word "I"', "speak for yourself"),
    ),
    "no_first_person": Check(
        "person",
        (
            "Avoids the first person.",
            'Neither "I" nor "my" is used.',
            'The writer never says "I", "me" or "my".',
        ),
    ),
    "asks": Check(
        "question",
        (
            "Asks a question at some point.",
            "There is a question mark somewhere.",
            "Contains at least one question.",
        ),
        ("ask a question", "include a question", "put in one question"),
    ),
    "asks_nothing": Check(
        "question",
        (
            "Asks no questions.",
            "Is free of question marks.",
            "Contains not one question.",
        ),
    ),
    "digit": Check(
        "digit",
        (
            "Gives a number in digits.",
            "Contains at least one digit.",
            "A figure such as 3 or 20 appears.",
        ),
        ("give a number in digits", "include a figure in digits", "use a number such as 20"),
    ),
    "no_digit": Check(
        "digit",
        (
            "Contains no digits.",
            "Is free of figures such as 3 or 20.",
            "No number is written in digits.",
        ),
    ),
    "short_words": Check(
        "style",
        (
            "No word has more than {n} letters.",
            "Every word has {n} letters or fewer.",
            "Uses only words of up to {n} letters.",
        ),
        ("use only words of up to {n} letters",),
    ),
    "exclaims": Check(
        "style",
        ("Contains an exclamation mark.", "Exclaims at least once.", "At some point there is an exclamation mark."),
        ("use an exclamation mark", "put in an exclamation mark"),
    ),
    "no_exclaim": Check(
        "style",
        ("Uses no exclamation marks.", "Is free of exclamation marks.", "Never exclaims with a mark."),
    ),
    "lowercase": Check(
        "style",
        ("Is written in lower case only.", "Contains no capital letters.", "All letters are small letters."),
        ("use only small letters", "write all in lower case", "use no capital letters"),
    ),
    "no_copy": Check(
        "style",
        (
            "Copies no {n} words in a row from the prompt.",
            "Shares no run of {n} words with the prompt.",
            "Rewords the prompt: no {n} words in a row are the same.",
        ),
    ),
    "no_repeat": Check(
        "style",
        (
            "No sentence repeats an earlier one.",
            "Never says the same sentence twice.",
            "All of its sentences differ.",
        ),
    ),
}


def _words(*words: str) -> list[str]:
    """Whole-word patterns for the library's keyword checks, which search by regular expression."""
    return [rf"\b{word}\b" for word in words]


def choose(check: str, **slots: Any) -> Choice:
    """The check with its slots filled and its verifier named. Raises KeyError on an unknown check."""
    builders: dict[str, Callable[..., tuple[str, dict[str, Any]]]] = {
        "words_max": lambda n: ("words", {"max": n}),
        "words_min": lambda n: ("words", {"min": n}),
        "sentences_exact": lambda n: ("sentences", {"min": n, "max": n}),
        "sentences_max": lambda n: ("sentences", {"max": n}),
        "sentences_min": lambda n: ("sentences", {"min": n}),
        "short_sentences": lambda n: ("max_sentence_words", {"max": n}),
        "complete": lambda: ("ends_complete", {}),
        "ends_question": lambda: ("ifeval:startend:end_checker", {"end_phrase": "?"}),
        "no_comma": lambda: ("ifeval:punctuation:no_comma", {}),
        "keyword": lambda word: ("ifeval:keywords:existence", {"keywords": _words(word)}),
        "twice": lambda word: (
            "ifeval:keywords:frequency",
            {"keyword": _words(word)[0], "frequency": 2, "relation": "at least"},
        ),
        "any_of": lambda first, second: ("mention_any", {"words": [first, second]}),
        "both": lambda first, second: ("ifeval:keywords:existence", {"keywords": _words(first, second)}),
        "avoid": lambda word: ("ifeval:keywords:forbidden_words", {"forbidden_words": [word]}),
        "starts_with": lambda word: ("starts_with", {"words": [word]}),
        "names_early": lambda word, n: ("mention_early", {"word": word, "within": n}),
        "no_filler": lambda: ("opening_not_filler", {}),
        "filler": lambda: ("opening_filler", {}),
        "bullets": lambda n: ("ifeval:detectable_format:number_bullet_lists", {"num_bullets": n}),
        "numbered": lambda n: ("numbered_list", {"items": n}),
        "title": lambda: ("ifeval:detectable_format:title", {}),
        "json": lambda: ("ifeval:detectable_format:json_format", {}),
        "quoted": lambda: ("ifeval:startend:quotation", {}),
        "postscript": lambda: ("ifeval:detectable_content:postscript", {"postscript_marker": "P.S."}),
        "one_paragraph": lambda: ("one_paragraph", {}),
        "you": lambda: ("addresses_reader", {}),
        "no_you": lambda: ("addresses_nobody", {}),
        "first_person": lambda: ("first_person", {}),
        "no_first_person": lambda: ("no_first_person", {}),
        "asks": lambda: ("has_question", {}),
        "asks_nothing": lambda: ("no_question", {}),
        "digit": lambda: ("has_digit", {}),
        "no_digit": lambda: ("no_digit", {}),
        "short_words": lambda n: ("max_word_length", {"max": n}),
        "exclaims": lambda: ("has_exclamation", {}),
        "no_exclaim": lambda: ("no_exclamation", {}),
        "lowercase": lambda: ("lowercase", {}),
        "no_copy": lambda n: ("no_copy", {"words": n}),
        "no_repeat": lambda: ("no_repeated_sentence", {}),
    }
    name, args = builders[check](**slots)
    if "n" in slots and check.startswith("sentences"):
        slots = {**slots, "s": "" if slots["n"] == 1 else "s"}
    return Choice(check, Verifier(name=name, args=args), slots)
