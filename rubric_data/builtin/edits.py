"""Exemplars by deterministic edits: texts made to meet exactly the criteria they are meant to meet.

An edit is a seeded hill climb over small moves on a text in parts (sentences, layout, title ...). The verifiers
decide after every move, so what an exemplar claims is what was checked. Sentences come from the topic's bank, a
few frames of the prompt's kind, and the sampled responses themselves.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random

from rubric_data.builtin.criteria import Choice
from rubric_data.builtin.topics import Topic
from rubric_data.records import Rubric
from rubric_data.reward import rubric_reward
from rubric_data.verifiers import prepare, sentences_of, words_of

PERFECT = "edit:toward-all"  # the generator of the exemplar that meets the whole rubric
_STEPS, _RESTARTS = 60, 5

_FRAMES: dict[str, tuple[str, ...]] = {
    "story": (
        "There once was {hero}.",
        "Everyone in town knew {hero}.",
        "Nobody believed {hero}.",
        "At last {hero} went home happy.",
        "The night was long and cold.",
        "Then a stranger knocked at the door.",
    ),
    "e-mail": (
        "Thank you for your kind note.",
        "I hope you are well.",
        "Here is some news about {name}.",
        "Write back soon.",
        "See you on Sunday.",
    ),
    "plan": (
        "Read a little about {name}.",
        "Find the right tools.",
        "Ask a friend for help.",
        "Start with small steps.",
        "Set a date and keep it.",
        "Check what you have learned.",
    ),
    "compare": (
        "Some people like {name} while others like {other}.",
        "Both {name} and {other} have a long history.",
        "I like {other} but prefer {name}.",
        "There is a clear gap between {name} and {other}.",
        "Each has its own use.",
    ),
    "advise": (
        "Start with small steps.",
        "Take your time and enjoy it.",
        "Ask an old hand for help.",
        "Nobody learns it in a day.",
        "Patience matters more than money.",
    ),
    "describe": (
        "Picture {thing}.",
        "Few sights compare with {thing}.",
        "It looks quiet and old.",
        "The colours are soft and deep.",
        "A faint smell hangs in the air.",
    ),
}
_STARTERS: dict[str, tuple[str, ...]] = {
    "dear": ("Dear Tom, here is some news about {name}.", "Dear Anna, let me tell you about {name}."),
    "hello": ("Hello Tom, here is some news about {name}.", "Hello neighbour, have you heard about {name}?"),
    "hi": ("Hi Anna, let me tell you about {name}.", "Hi there, this is a note about {name}."),
    "once": ("Once upon a time there was {hero}.", "Once there lived {hero}."),
    "one": ("One day the town heard of {hero}.", "One cold night {hero} could not sleep."),
    "long": ("Long ago there lived {hero}.", "Long after dark {hero} came home."),
}
_LONG_WORDS = (
    "That is particularly fascinating.",
    "Understanding it requires considerable concentration.",
    "The underlying explanation remains extraordinarily complicated.",
    "It is an unquestionably remarkable accomplishment.",
)
_PLAIN_WORDS = {
    "and": "Many people like it and want more.",
    "is": "There is much to learn.",
    "it": "Few people know it well.",
    "can": "Anyone can see that.",
    "many": "There are many reasons.",
    "that": "All of that takes time.",
    "of": "It takes a bit of time.",
    "also": "There are also other views.",
    "while": "It takes a while to learn.",
    "but": "It is small but strong.",
    "both": "There is good in both.",
}
_ANY_WORD = ("Much depends on {word}.", "It all comes down to {word}.", "Think of {word}.")  # for nouns
_QUESTIONS = ("What do you think?", "Is that not strange?", "Who would have thought so?", "Would you agree?")
_ASKING = (
    "Did you know that",
    "Have you heard that",
    "Is it not strange that",
    "Who would guess that",
    "Is it true that",
    "Why do people say that",
)
_IMPERATIVES = frozenset({"Ask", "Check", "Find", "Picture", "Read", "See", "Set", "Start", "Take", "Think", "Write"})
_PROPER = frozenset({"I", "Indonesia"})  # keep their capital inside a sentence
# what nearly every response meets if left alone, so that exemplars break it more often
_OFTEN_MET = frozenset(
    {
        "complete",
        "words_max",
        "no_filler",
        "filler",
        "one_paragraph",
        "asks_nothing",
        "no_exclaim",
        "no_you",
        "no_digit",
        "no_first_person",
        "no_repeat",
    }
)
_LEAD_INS = ("In fact", "In short", "As a rule", "Most of all", "By the way", "In the end", "For example", "Today")
_TAILS = ("of course", "it seems", "as we know", "they say", "after all", "in most cases")
_OPENERS = ("Sure!", "Certainly!", "Of course!", "Well,", "Absolutely!", "Sure,", "Great!", "Okay,", "Thanks!")
_TITLES = (
    "{Name}",
    "About {Name}",
    "A Note on {Name}",
    "The World of {Name}",
    "A Small Secret",
    "Things Worth Knowing",
)


@dataclass(frozen=True)
class Text:
    """A response in parts; `render` puts them together."""

    items: tuple[str, ...]  # sentences with their final mark
    layout: str = " "  # what stands between sentences: " ", a line break, or a list marker "-", "*" or "1"
    opener: str = ""  # chatty words before the first sentence
    title: str = ""
    postscript: str = ""
    json: bool = False
    quoted: bool = False
    lower: bool = False
    cut: int = 0  # words broken off the end

    def render(self) -> str:
        """The response as text."""
        if self.layout in ("-", "*"):
            body = "\n".join(f"{self.layout} {item}" for item in self.items)
        elif self.layout == "1":
            body = "\n".join(f"{number}. {item}" for number, item in enumerate(self.items, start=1))
        else:
            body = self.layout.join(self.items)
        if self.opener and self.layout in (" ", "\n"):
            body = f"{self.opener} {_lowered(body) if self.opener.endswith(',') else body}"
        elif self.opener:
            body = f"{self.opener}\n{body}"
        if self.cut:
            body = _break_off(body, self.cut)
        if self.quoted:
            body = f'"{body}"'
        if self.json:
            body = json.dumps({"answer": body}, ensure_ascii=False)
        if self.title:
            body = f"<<{self.title}>>\n{body}"
        if self.postscript:
            body = f"{body}\nP.S. {self.postscript}"
        return body.lower() if self.lower else body


def _break_off(body: str, words: int) -> str:
    kept = re.findall(r"\s*\S+", body)
    return "".join(kept[: max(2, len(kept) - words)]).rstrip(".!?,")


def parse(response: str) -> Text:
    """A sampled response in parts; its own list or line layout is kept where it has one."""
    lines = [line for line in response.splitlines() if line.strip()]
    markers = [re.match(r"\s*([-*]|\d+[.)])\s", line) for line in lines]
    found = [marker.group(1)[0] for marker in markers if marker]
    layout = " " if len(lines) < 2 else "\n"
    if found:
        layout = found[0] if found[0] in "-*" else "1"
    return Text(items=sentences_of(response) or ("Nothing.",), layout=layout)


@dataclass(frozen=True)
class Bench:
    """What an edit works with: the prompt, its rubric and checks, and sentences to draw on."""

    prompt: str
    kind: str
    topic: Topic
    rubric: Rubric
    choices: tuple[Choice, ...]  # in the rubric's order

    @cached_property
    def bank(self) -> list[str]:
        """Sentences that suit the prompt."""
        frames = [frame.format(**vars(self.topic)) for frame in _FRAMES.get(self.kind, ())]
        return [*self.topic.sentences, *frames]

    @cached_property
    def ideal(self) -> tuple[bool, ...]:
        """The verdicts of a perfect response: pitfalls are not met."""
        return tuple(criterion.weight > 0 for criterion in self.rubric.criteria)

    def verdicts(self, response: str) -> tuple[bool, ...]:
        """What the verifiers say of ``response``, in the rubric's order."""
        return tuple(test(response, self.prompt) for test in self._tests)

    @cached_property
    def _tests(self) -> list[Callable[[str, str], bool]]:
        return [prepare(choice.verifier) for choice in self.choices]

    def reward(self, response: str) -> float:
        """The response's reward under the rubric, in [0, 1]."""
        return _reward(self, self.verdicts(response))


Move = Callable[[Text, Bench, Choice, Random], Text]


def _filled(template: str, bench: Bench) -> str:
    topic = bench.topic
    return template.format(Name=topic.name.capitalize(), **vars(topic))


def _insert(text: Text, sentence: str, random: Random) -> Text:
    at = random.randint(0, len(text.items))
    return replace(text, items=(*text.items[:at], sentence, *text.items[at:]), cut=0)


def _add(text: Text, bench: Bench, _: Choice, random: Random) -> Text:
    rest = [sentence for sentence in bench.bank if sentence not in text.items]
    return _insert(text, random.choice(rest), random) if rest else text


def _drop(text: Text, bench: Bench, _: Choice, random: Random) -> Text:
    if len(text.items) < 2:
        return text
    at = random.randrange(len(text.items))
    return replace(text, items=(*text.items[:at], *text.items[at + 1 :]), cut=0)


def _swap(text: Text, bench: Bench, choice: Choice, random: Random) -> Text:
    rest = [sentence for sentence in bench.bank if sentence not in text.items]
    at = random.randrange(len(text.items))
    return replace(text, items=(*text.items[:at], random.choice(rest), *text.items[at + 1 :]), cut=0) if rest else text


def _join(text: Text, bench: Bench, _: Choice, random: Random) -> Text:
    """Two neighbours become one sentence."""
    if len(text.items) < 2:
        return text
    at = random.randrange(len(text.items) - 1)
    first, second = text.items[at : at + 2]
    if first[-1:] not in (".", "!") or second.endswith("?"):
        return text
    joined = f"{first.rstrip('.!')} {random.choice(('and', 'and', 'while', 'but'))} {_lowered(second)}"
    return replace(text, items=(*text.items[:at], joined, *text.items[at + 2 :]), cut=0)


def _shuffle(text: Text, bench: Bench, _: Choice, random: Random) -> Text:
    return replace(text, items=tuple(random.sample(text.items, len(text.items))), cut=0)


def _finish(text: Text, bench: Bench, _: Choice, random: Random) -> Text:
    """A broken-off end becomes a whole sentence."""
    last = text.items[-1]
    whole = last if last.endswith((".", "!", "?")) else last.rstrip(",;:- ") + "."
    return replace(text, items=(*text.items[:-1], whole), cut=0)


def _cut(text: Text, bench: Bench, _: Choice, random: Random) -> Text:
    return replace(text, cut=random.randint(1, 4))


def _decomma(text: Text, bench: Bench, _: Choice, random: Random) -> Text:
    items = tuple(item.replace(",", "") for item in text.items)
    return replace(text, items=items, opener=text.opener.replace(",", "!"), postscript=text.postscript.replace(",", ""))


def _comma(text: Text, bench: Bench, _: Choice, random: Random) -> Text:
    at = random.randrange(len(text.items))
    item = text.items[at]
    if random.random() < 0.5 and item[-1:] in ".!":
        changed = f"{item[:-1]}, {random.choice(_TAILS)}{item[-1]}"
    else:
        changed = f"{random.choice(_LEAD_INS)}, {_lowered(item)}"
    return replace(text, items=(*text.items[:at], changed, *text.items[at + 1 :]))


def _with_word(text: Text, bench: Bench, choice: Choice, random: Random) -> Text:
    """A sentence with one of the check's words comes in, or takes another's place."""
    words = [str(choice.slots[slot]) for slot in ("word", "first", "second") if slot in choice.slots]
    word = random.choice(words).casefold()
    fitting = [sentence for sentence in bench.bank if word in words_of(sentence)]
    fitting.append(_PLAIN_WORDS.get(word) or random.choice(_ANY_WORD).format(word=word))
    sentence = random.choice(fitting)
    at = 0 if choice.check == "names_early" else random.randrange(len(text.items))
    kept = text.items[at + 1 :] if random.random() < 0.5 else text.items[at:]
    return replace(text, items=(*text.items[:at], sentence, *kept), cut=0)


def _start(text: Text, bench: Bench, choice: Choice, random: Random) -> Text:
    opening = _filled(random.choice(_STARTERS[str(choice.slots["word"]).casefold()]), bench)
    kept = text.items[1:] if random.random() < 0.5 else text.items
    return replace(text, items=(opening, *kept), opener="", cut=0)


def _unstart(text: Text, bench: Bench, choice: Choice, random: Random) -> Text:
    return replace(text, items=(random.choice(bench.bank), *text.items[1:]))


def _opener(text: Text, bench: Bench, _: Choice, random: Random) -> Text:
    return replace(text, opener=random.choice(_OPENERS))


def _no_opener(text: Text, bench: Bench, choice: Choice, random: Random) -> Text:
    return replace(_unstart(text, bench, choice, random) if not text.opener else text, opener="")


def _ask(text: Text, bench: Bench, _: Choice, random: Random) -> Text:
    question = random.choice((bench.topic.question, bench.topic.question, *_QUESTIONS))
    kept = text.items[:-1] if random.random() < 0.5 else text.items
    return replace(text, items=(*kept, question), cut=0)


def _turn_into_question(text: Text, bench: Bench, _: Choice, random: Random) -> Text:
    last = text.items[-1]
    if last[-1:] not in (".", "!") or last.split()[0] in _IMPERATIVES:
        return text
    question = f"{random.choice(_ASKING)} {_lowered(last)[:-1]}?"
    return replace(text, items=(*text.items[:-1], question), cut=0)


def _lowered(sentence: str) -> str:
    """``sentence`` as it stands inside another."""
    return sentence if sentence.split()[0] in _PROPER else sentence[0].lower() + sentence[1:]


def _unask(text: Text, bench: Bench, _: Choice, random: Random) -> Text:
    kept = tuple(item for item in text.items if "?" not in item)
    return replace(text, items=kept or (random.choice(bench.topic.facts),), cut=0)


def _exclaim(text: Text, bench: Bench, _: Choice, random: Random) -> Text:
    at = random.randrange(len(text.items))
    item = text.items[at]
    changed = item[:-1] + "!" if item.endswith(".") else item
    return replace(text, items=(*text.items[:at], changed, *text.items[at + 1 :]))


def _calm(text: Text, bench: Bench, _: Choice, random: Random) -> Text:
    return replace(text, items=tuple(item.replace("!", ".") for item in text.items), opener="")


def _of_kind(index: int) -> Move:
    """A sentence of the bank by its place: the digit (4), the reader (5), the writer (6)."""

    def move(text: Text, bench: Bench, _: Choice, random: Random) -> Text:
        sentence = bench.topic.sentences[index]
        if random.random() < 0.5:
            return _insert(text, sentence, random)
        at = random.randrange(len(text.items))
        return replace(text, items=(*text.items[:at], sentence, *text.items[at + 1 :]), cut=0)

    return move


def _long_words(text: Text, bench: Bench, _: Choice, random: Random) -> Text:
    return _insert(text, random.choice(_LONG_WORDS), random)


def _repeat(text: Text, bench: Bench, _: Choice, random: Random) -> Text:
    return replace(text, items=(*text.items, random.choice(text.items)), cut=0)


def _copy(text: Text, bench: Bench, _: Choice, random: Random) -> Text:
    return _insert(text, random.choice(sentences_of(bench.prompt)[:-1] or bench.bank), random)


def _layout(*layouts: str) -> Move:
    return lambda text, bench, choice, random: replace(text, layout=random.choice(layouts), opener="")


def _title(text: Text, bench: Bench, _: Choice, random: Random) -> Text:
    return replace(text, title=_filled(random.choice(_TITLES), bench))


def _postscript(text: Text, bench: Bench, _: Choice, random: Random) -> Text:
    return replace(text, postscript=random.choice(bench.bank))


def _flag(**values: object) -> Move:
    return lambda text, bench, choice, random: replace(text, **values)  # type: ignore[arg-type]


_LINES, _PLAIN = _layout("\n"), _layout(" ")
# check -> moves that help to meet it, moves that help to miss it
_MOVES: dict[str, tuple[tuple[Move, ...], tuple[Move, ...]]] = {
    "words_max": ((_drop, _swap), (_add, _add, _join)),
    "words_min": ((_add, _join), (_drop, _swap)),
    "sentences_exact": ((_drop, _add, _join), (_add, _drop)),
    "sentences_max": ((_drop, _join), (_add,)),
    "sentences_min": ((_add,), (_drop, _join)),
    "short_sentences": ((_swap, _drop), (_join, _comma)),
    "complete": ((_finish, _drop), (_cut,)),
    "ends_question": ((_ask, _turn_into_question), (_unask, _cut, _add)),
    "no_comma": ((_decomma,), (_comma,)),
    "keyword": ((_with_word,), (_drop, _swap)),
    "twice": ((_with_word,), (_drop, _swap)),
    "any_of": ((_with_word,), (_drop, _swap)),
    "both": ((_with_word,), (_drop, _swap)),
    "avoid": ((_drop, _swap), (_with_word,)),
    "starts_with": ((_start,), (_unstart,)),
    "names_early": ((_with_word, _shuffle), (_opener, _unstart, _comma)),
    "no_filler": ((_no_opener,), (_opener,)),
    "filler": ((_opener,), (_no_opener,)),
    "bullets": ((_layout("-", "*"), _drop, _add), (_LINES, _PLAIN, _drop, _add)),
    "numbered": ((_layout("1"), _drop, _add), (_layout("-", "\n"), _PLAIN, _drop, _add)),
    "title": ((_title,), (_flag(title=""),)),
    "json": ((_flag(json=True), _finish), (_flag(json=False),)),
    "quoted": ((_flag(quoted=True),), (_flag(quoted=False),)),
    "postscript": ((_postscript,), (_flag(postscript=""),)),
    "one_paragraph": ((_PLAIN,), (_LINES, _layout("-", "1"))),
    "you": ((_of_kind(5),), (_drop, _swap)),
    "no_you": ((_drop, _swap), (_of_kind(5),)),
    "first_person": ((_of_kind(6),), (_drop, _swap)),
    "no_first_person": ((_drop, _swap), (_of_kind(6),)),
    "asks": ((_ask, _turn_into_question), (_unask,)),
    "asks_nothing": ((_unask,), (_ask, _turn_into_question)),
    "digit": ((_of_kind(4),), (_drop, _swap)),
    "no_digit": ((_drop, _swap), (_of_kind(4),)),
    "short_words": ((_swap, _drop), (_long_words,)),
    "exclaims": ((_exclaim,), (_calm,)),
    "no_exclaim": ((_calm,), (_exclaim,)),
    "lowercase": ((_flag(lower=True),), (_flag(lower=False),)),
    "no_copy": ((_swap, _drop), (_copy,)),
    "no_repeat": ((_drop,), (_repeat,)),
}


def climb(text: Text, target: Sequence[bool], bench: Bench, random: Random) -> Text | None:
    """``text`` moved until its verdicts are exactly ``target``; None if that was not reached."""

    def wrong(candidate: Text) -> list[int]:
        found = bench.verdicts(candidate.render())
        return [i for i, (is_met, wanted) in enumerate(zip(found, target, strict=True)) if is_met != wanted]

    missing = wrong(text)
    for _ in range(_STEPS):
        if not missing:
            return text
        index = random.choice(missing)
        choice = bench.choices[index]
        move = random.choice(_MOVES[choice.check][0 if target[index] else 1])
        candidate = move(text, bench, choice, random)
        left = wrong(candidate)
        if len(left) <= len(missing):
            text, missing = candidate, left
    return None if missing else text


def _compose(bench: Bench, samples: Sequence[str], random: Random) -> Text:
    """Somewhere to start: sentences of the bank, or the beginning of a sample."""
    if random.random() < 0.5:
        whole = parse(random.choice(samples))
        return replace(whole, items=whole.items[: random.randint(1, 2)])
    return Text(items=tuple(random.sample(bench.bank, random.randint(1, 3))))


def _reach(
    bench: Bench, target: Sequence[bool], start: Callable[[Random], Text], seed: str, used: set[str]
) -> str | None:
    """A text with exactly the verdicts ``target`` that is not in ``used``; None after too many tries."""
    for attempt in range(_RESTARTS):
        random = Random(f"{seed} {attempt}")
        text = climb(start(random), target, bench, random)
        if text is not None and text.render() not in used:
            used.add(text.render())
            return text.render()
    return None


def _perfect(bench: Bench, samples: Sequence[str], seed: str, used: set[str]) -> str | None:
    """A response that meets the whole rubric; None if none was found."""
    return _reach(bench, bench.ideal, lambda random: _compose(bench, samples, random), f"{seed} toward-all", used)


def exemplars(bench: Bench, samples: Sequence[str], seed: str) -> list[tuple[str, str]]:
    """(generator, response) of the edited exemplars, all different; each claims what the verifiers confirmed.

    One that meets everything, two that miss one criterion each (of different weights), two samples with some
    criteria repaired, and two good texts with several criteria broken. One that cannot be reached is left out.
    """
    used = set(samples)
    found = [(PERFECT, _perfect(bench, samples, seed, used))]
    found += [("edit:excellent-minus-one", text) for text in _minus_one(bench, samples, seed, used)]
    # a reward that an excellent one has already would only make a tie among the best
    rewards = {bench.reward(text) for _, text in found if text is not None}
    for number, sample in enumerate(Random(seed).sample(list(samples), 2)):
        found.append(("edit:toward-part", _repaired(bench, sample, f"{seed} toward-part {number}", used, rewards)))
    for number, breaks in enumerate(((2, 3), (3, 5))):
        found.append(("edit:away", _spoilt(bench, samples, breaks, f"{seed} away {number}", used, rewards)))
    return [(generator, text) for generator, text in found if text is not None]


def _minus_one(bench: Bench, samples: Sequence[str], seed: str, used: set[str]) -> list[str]:
    """Up to two responses that miss one criterion each; the two criteria differ in weight."""
    found: dict[float, str] = {}
    for index in Random(f"{seed} minus-one").sample(range(len(bench.ideal)), len(bench.ideal)):
        weight = abs(bench.rubric.criteria[index].weight)
        if len(found) == 2 or weight in found:
            continue
        target = _flip(bench.ideal, [index])
        text = _reach(bench, target, lambda random: _compose(bench, samples, random), f"{seed} minus {index}", used)
        if text is not None:
            found[weight] = text
    return list(found.values())


def _spoilt(
    bench: Bench, samples: Sequence[str], breaks: tuple[int, int], seed: str, used: set[str], rewards: set[float]
) -> str | None:
    """A response that misses ``breaks`` (least, most) criteria; its reward is not one of ``rewards``."""
    for attempt in range(_RESTARTS):
        random = Random(f"{seed} {attempt}")
        target = _flip(bench.ideal, _broken(bench, random.randint(*breaks), random))
        if _reward(bench, target) in rewards:
            continue
        text = _reach(bench, target, lambda chance: _compose(bench, samples, chance), f"{seed} {attempt}", used)
        if text is not None:
            return text
    return None


def _reward(bench: Bench, verdicts: Sequence[bool]) -> float:
    return rubric_reward(bench.rubric, [float(met) for met in verdicts])


def _broken(bench: Bench, count: int, random: Random) -> list[int]:
    """``count`` criteria to break, those that most responses meet rather than others."""
    keys = [random.random() ** (1 / 8 if choice.check in _OFTEN_MET else 1) for choice in bench.choices]
    return sorted(range(len(keys)), key=lambda i: -keys[i])[:count]


def _repaired(bench: Bench, sample: str, seed: str, used: set[str], rewards: set[float]) -> str | None:
    """The sample with one to three of its failing criteria repaired, never all, and the others as they were."""
    start = parse(sample)
    before = bench.verdicts(start.render())
    failing = [i for i, (met, wanted) in enumerate(zip(before, bench.ideal, strict=True)) if met != wanted]
    for attempt in range(_RESTARTS if len(failing) > 1 else 0):
        random = Random(f"{seed} {attempt}")
        repaired = random.sample(failing, min(len(failing) - 1, random.randint(1, 3)))
        target = _flip(before, repaired)
        if _reward(bench, target) in rewards:
            continue
        text = _reach(bench, target, lambda _: start, f"{seed} {attempt}", used)
        if text is not None:
            return text
    return None


def _flip(verdicts: Sequence[bool], indices: Sequence[int]) -> tuple[bool, ...]:
    return tuple(met != (i in indices) for i, met in enumerate(verdicts))
