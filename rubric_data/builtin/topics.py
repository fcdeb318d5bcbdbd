"""The topics of the embedded data and their sentence bank (topics.txt). Knows no rubrics."""

import functools
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Topic:
    """One topic: how prompts speak of it, and a few true sentences that exemplars are made from."""

    name: str
    how: str  # follows "Explain"
    ask: str  # the same as a question
    activity: str  # follows "wants to"
    other: str  # what it is compared with
    hero: str  # whom a story is about
    thing: str  # what is described
    keywords: tuple[str, ...]  # words of the facts
    facts: tuple[str, ...]  # five sentences without commas; the last holds a digit
    you: str  # speaks to the reader
    me: str  # in the first person
    question: str  # ends with a question mark

    @property
    def sentences(self) -> tuple[str, ...]:
        """All sentences of the bank, the question last."""
        return (*self.facts, self.you, self.me, self.question)


@functools.cache
def load_topics() -> tuple[Topic, ...]:
    """The topics in the order of the file. Raises ValueError on a block of the wrong shape."""
    text = (resources.files(__package__) / "topics.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    blocks = "\n".join(lines).strip().split("\n\n")
    return tuple(_parse(block.strip().splitlines()) for block in blocks)


def _parse(lines: list[str]) -> Topic:
    head = [part.strip() for part in lines[0].split("|")]
    if len(head) != 7 or len(lines) != 10:
        raise ValueError(f"topics.txt: block {lines[0]!r} needs 7 fields and 10 lines, got {len(head)}, {len(lines)}")
    name, how, ask, activity, other, hero, thing = head
    keywords, facts = tuple(lines[1].split()), tuple(lines[2:7])
    return Topic(name, how, ask, activity, other, hero, thing, keywords, facts, *lines[7:10])
