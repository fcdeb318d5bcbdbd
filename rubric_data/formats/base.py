"""What the formats share: the example that a row becomes, checks of rows, ids, dialogues as text. Knows no format."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Tag, ValidationError

from rubric_data.errors import UserError
from rubric_data.io import explain
from rubric_data.records import Criterion, JudgedResponse, PromptRecord, Rubric, Verdict

Model = TypeVar("Model", bound=BaseModel)
Placed = tuple[str, dict[str, Any]]  # a row and where it stands, for messages

REFERENCE = "reference"  # the generator of reference answers


class Row(BaseModel):
    """Base of what a format reads of its rows; columns it does not name are ignored, and the import says which."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Message(Row):
    """One turn of a dialogue."""

    role: str
    content: str


# The tags are what messages call the place of a fault: "field chosen.messages.0.content"
Told = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Message], Tag("messages")],
    Discriminator(lambda told: "text" if isinstance(told, str) else "messages"),
]  # a prompt or a response, as text or as a dialogue


class SkipRow(Exception):
    """A row is well formed, but no example can be made of it; the text says why, in words that can be counted."""


@dataclass(frozen=True)
class Answer:
    """A response as a source tells it; ``name`` becomes part of its id."""

    text: str
    name: str
    generator: str = "unknown"
    preference: float | None = None
    verdicts: tuple[Verdict, ...] = ()


@dataclass(frozen=True)
class Example:
    """What one row says: a prompt, its rubric, responses; and a reason for each thing of it that is left out.

    ``prompt_id`` is the source's own; empty means that it has none.
    """

    prompt: str
    rubric: Rubric | None
    prompt_id: str = ""
    answers: tuple[Answer, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """A prompt with every response to it, on the way out."""

    prompt: PromptRecord
    responses: tuple[JudgedResponse, ...] = ()


@dataclass(frozen=True)
class Written:
    """Rows, or one document, in another format; and how many things of each kind it could not hold."""

    content: list[dict[str, Any]] | dict[str, Any]
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Format:
    """A format by its parts. ``source`` and ``licence`` are its publisher's; empty where there is none, or none known.

    ``read`` makes an example of one checked row, given where it stands. ``unfold`` takes the rows out of a document
    that is no plain list of them. Without ``write`` a format is for import only.
    """

    row: type[Row]
    read: Callable[[Any, str], Example]
    source: str = ""
    licence: str = ""
    unfold: Callable[[dict[str, Any], str], list[Placed]] | None = None
    write: Callable[..., Written] | None = None


def parse(kind: type[Model], fields: Mapping[str, Any], where: str) -> Model:
    """``fields`` checked as a ``kind``; a null counts as absent. Raises UserError with place, field and remedy."""
    try:
        return kind.model_validate(_without_nulls(fields))
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error)}") from None


def _without_nulls(value: Any) -> Any:
    """``value`` without the nulls that tables write for keys which a row does not have."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def read_row(form: Format, row: Mapping[str, Any], where: str) -> Example:
    """The example that ``row`` holds in format ``form``. Raises UserError if it is malformed, else maybe SkipRow."""
    example = form.read(parse(form.row, row, where), where)
    if not example.prompt.strip():
        raise SkipRow("row without a prompt")
    return example


def make_rubric(criteria: Iterable[Mapping[str, Any]], where: str) -> tuple[Rubric | None, tuple[str, ...]]:
    """The rubric of ``criteria``, each the fields of a `Criterion`, and the reasons for what is left out of it.

    Ids are made unique; a criterion without one is called c1, c2 ... by its place. There is no rubric if no
    criterion has a positive weight. Raises UserError on a weight that is no finite number.
    """
    kept, left_out, criteria = [], [], list(criteria)
    if not criteria:
        return None, ("no rubric",)
    for fields in criteria:
        if not fields["text"].strip():
            left_out.append("criterion without text")
        elif fields["weight"] == 0:
            left_out.append("criterion of weight 0")
        else:
            kept.append(fields)
    ids = unique_ids([fields.get("id", "") for fields in kept])
    checked = tuple(parse(Criterion, {**fields, "id": name}, where) for fields, name in zip(kept, ids, strict=True))
    if not any(criterion.weight > 0 for criterion in checked):
        return None, (*left_out, "rubric without a criterion of positive weight")
    return Rubric(criteria=checked), tuple(left_out)


def unique_ids(names: Sequence[str]) -> list[str]:
    """``names`` without outer white space, an empty one by its place (c1, c2 ...), a repeated one with #2, #3 ..."""
    taken: set[str] = set()
    ids = []
    for place, name in enumerate(names, start=1):
        ids.append(free_name(name.strip() or f"c{place}", taken, " #"))
        taken.add(ids[-1])
    return ids


def free_name(name: str, taken: Iterable[str], joint: str) -> str:
    """``name``, or the first of name, joint and 2, 3 ... that is not ``taken``."""
    found, count = name, 1
    while found in taken:
        count += 1
        found = f"{name}{joint}{count}"
    return found


def transcript(messages: Sequence[Message]) -> str:
    """A dialogue as text: the words of a single message, or "role: words" for each turn, a blank line between."""
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in messages)


def prompt_messages(prompt: str) -> list[dict[str, str]]:
    """``prompt`` as the messages of a dialogue: the turns of a transcript, else one message of the user.

    A transcript is what `transcript` writes of two messages or more: the system's, if any, then the user's and the
    assistant's by turns, the user's first and last. A turn ends where the one that has to follow begins, so
    ``transcript`` of the messages is ``prompt`` again; a turn that itself quotes such a line is cut there.
    """
    turns = _turns(prompt)
    if len(turns) > 1 and turns[-1][0] == "user":
        return [{"role": role, "content": content} for role, content in turns]
    return [{"role": "user", "content": prompt}]


def _turns(text: str) -> list[tuple[str, str]]:
    """Role and words of the turns at the beginning of ``text``; the last one has all that is left."""
    role = "system" if text.startswith("system: ") else "user"
    if not text.startswith(f"{role}: "):
        return []
    found, left = [], text.removeprefix(f"{role}: ")
    while True:
        following = "assistant" if role == "user" else "user"
        content, border, rest = left.partition(f"\n\n{following}: ")
        found.append((role, content))
        if not border:
            return found
        role, left = following, rest


def assistant_message(response: str) -> list[dict[str, str]]:
    """``response`` as what follows `prompt_messages` in the dialogue."""
    return [{"role": "assistant", "content": response}]


def number(value: float) -> float | int:
    """``value`` as people write it: 5, not 5.0."""
    return int(value) if value == int(value) else value


def reference_and_others(responses: Sequence[JudgedResponse]) -> tuple[str | None, list[JudgedResponse]]:
    """The text of the first reference answer, if there is one, and the responses besides it."""
    for place, response in enumerate(responses):
        if response.generator == REFERENCE:
            return response.response, [*responses[:place], *responses[place + 1 :]]
    return None, list(responses)


def level_names(criterion: Criterion) -> list[str]:
    """The levels of ``criterion`` from worst to best, for formats without anchors: in one text each, all different."""
    return unique_ids([f"{level.label}: {level.anchor}" if level.anchor else level.label for level in criterion.levels])


def losses(groups: Iterable[Group], *held: str, tags: Iterable[str] = ()) -> Counter[str]:
    """How many things of ``groups`` have no place in a format, by kind.

    ``held`` names the kinds that have one; of the tags only ``tags`` do, unless "tags" is held.
    """
    found: Counter[str] = Counter()
    for group in groups:
        for criterion in group.prompt.rubric.criteria if group.prompt.rubric else ():
            found["tags"] += bool(set(criterion.tags).difference(tags))
            found["levels"] += bool(criterion.levels)
            found["vetoes"] += criterion.veto
            found["verifiers"] += criterion.verifier is not None
        for response in group.responses:
            found["verdicts"] += len(response.verdicts)
            found["preferences"] += response.preference is not None
    return Counter({kind: count for kind, count in found.items() if count and kind not in held})


def with_rubric(groups: Iterable[Group]) -> tuple[list[tuple[Group, Rubric]], Counter[str]]:
    """The groups whose prompt has a rubric, with it; and the count of the others."""
    groups = list(groups)
    having = [(group, group.prompt.rubric) for group in groups if group.prompt.rubric]
    left = len(groups) - len(having)
    return having, Counter({"prompts without a rubric": left} if left else {})
