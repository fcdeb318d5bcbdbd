"""The recipe of the embedded data: prompts of twelve kinds, their rubrics, and the splits.

Half of a rubric is asked for in the prompt and fixed before anything is sampled; the other half is unstated
quality, chosen after sampling so that each kind of check is met about as often as not. Exemplars by edits are
`rubric_data.builtin.edits`; sampling itself is `rm.build_builtin`. Everything is drawn from string seeds, so the
same words give the same data.
"""

import hashlib
import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from rubric_data.builtin.criteria import CHECKS, Choice, choose
from rubric_data.builtin.edits import PERFECT, Bench, exemplars
from rubric_data.builtin.topics import Topic, load_topics
from rubric_data.records import Rubric, Split
from rubric_data.verifiers import verify

SEED = "rubric-rm builtin 1"
PROMPTS_PER_TOPIC = 3
_FRACTIONS: tuple[tuple[Split, float], ...] = (("train", 0.70), ("validation", 0.10), ("test", 0.20))

Pool = Sequence[Callable[[Topic, Random], Choice]]


@dataclass(frozen=True)
class Kind:
    """A kind of prompt: how it is put, and pools of checks it may ask for (one is drawn from each)."""

    tasks: tuple[str, ...]
    pools: tuple[Pool, ...]


@dataclass(frozen=True)
class Draft:
    """A prompt before its rubric is whole: the checks its text asks for."""

    prompt_id: str
    kind: str
    topic: Topic
    split: Split
    prompt: str
    stated: tuple[Choice, ...]


def _fixed(check: str, *values: int) -> Callable[[Topic, Random], Choice]:
    """A check with one of ``values`` as its number, or with none."""

    def make(_: Topic, random: Random) -> Choice:
        return choose(check, n=random.choice(values)) if values else choose(check)

    return make


def _word(check: str, *words: str) -> Callable[[Topic, Random], Choice]:
    """A check on one of ``words``; without words, on a keyword of the topic."""

    def make(topic: Topic, random: Random) -> Choice:
        return choose(check, word=random.choice(words or topic.keywords))

    return make


def _name(check: str) -> Callable[[Topic, Random], Choice]:
    return lambda topic, _: choose(check, word=topic.name)


def _two_keywords(check: str) -> Callable[[Topic, Random], Choice]:
    def make(topic: Topic, random: Random) -> Choice:
        first, second = random.sample(topic.keywords, 2)
        return choose(check, first=first, second=second)

    return make


def _both_names(topic: Topic, _: Random) -> Choice:
    return choose("both", first=topic.name, second=topic.other)


_SHORT: Pool = [_fixed("words_max", 25, 28, 30, 32, 35, 38, 40), _fixed("sentences_exact", 1, 2)]
_WORDS: Pool = [_fixed("words_max", 25, 28, 30, 32, 35, 38, 40)]
_TERSE: Pool = [_fixed("words_max", 15, 18, 20, 22, 25)]
_TOPICAL: Pool = [_word("keyword"), _word("keyword"), _two_keywords("any_of"), _name("keyword")]
_PLAIN: Pool = [_fixed("no_comma"), _fixed("no_comma"), _fixed("ends_question"), _fixed("digit")]
_COUNTED: Pool = [_fixed("bullets", 2, 3), _fixed("numbered", 2, 3)]

KINDS: dict[str, Kind] = {
    "explain": Kind(
        ("Explain {how}.", "Tell a child {how}.", "In simple terms, explain {how}."),
        (_SHORT, _TOPICAL, _PLAIN),
    ),
    "rewrite": Kind(
        ("Rewrite this sentence: {fact}", "Say this in other words: {fact}", "Rephrase for a child: {fact}"),
        (
            [_fixed("lowercase"), _fixed("first_person"), _fixed("quoted"), _fixed("ends_question"), _fixed("you")],
            _TERSE,
        ),
    ),
    "list": Kind(
        ("List some facts about {name}.", "Give me a few facts about {name}.", "What should one know about {name}?"),
        (_COUNTED, [*_TOPICAL, *_TOPICAL, _fixed("no_comma")], [*_WORDS, _fixed("no_comma"), _fixed("digit")]),
    ),
    "e-mail": Kind(
        (
            "Write a short e-mail to a friend about {name}.",
            "Write a note to my teacher about {name}.",
            "Draft a brief e-mail to a neighbour about {name}.",
        ),
        (
            [_word("starts_with", "Dear", "Hello", "Hi"), _fixed("postscript"), _fixed("postscript")],
            _WORDS,
            [*_TOPICAL, _fixed("ends_question"), _fixed("no_comma")],
        ),
    ),
    "story": Kind(
        ("Tell a tiny story about {hero}.", "Write a very short tale of {hero}.", "Make up a story about {hero}."),
        (
            [
                _fixed("title"),
                _fixed("title"),
                _word("starts_with", "Once", "One", "Long"),
                _fixed("first_person"),
                _fixed("exclaims"),
            ],
            _SHORT,
            [*_TOPICAL, _fixed("no_comma")],
        ),
    ),
    "plan": Kind(
        (
            "Make a plan for someone who wants to {activity}.",
            "Plan the first steps to {activity}.",
            "I want to {activity}. Make a plan.",
        ),
        (_COUNTED, [_fixed("no_comma"), *_WORDS], [*_TOPICAL, _fixed("you")]),
    ),
    "compare": Kind(
        ("Compare {name} and {other}.", "How do {name} and {other} differ?", "Set {name} against {other}."),
        (
            [_word("keyword", "while", "but", "both"), _both_names],
            _SHORT,
            [_fixed("no_comma"), _fixed("ends_question")],
        ),
    ),
    "format": Kind(
        ("{ask}", "{ask} I need a formatted answer.", "Answer me this: {ask}"),
        (
            [_fixed("json"), _fixed("json"), _fixed("title"), _fixed("title"), _fixed("quoted"), _fixed("bullets", 2)],
            [*_WORDS, *_TOPICAL],
            [_word("keyword"), _fixed("no_comma")],
        ),
    ),
    "summarise": Kind(
        ("Summarise: {fact} {fact2}", "Shorten this: {fact} {fact2}", "Sum up: {fact} {fact2}"),
        ([_fixed("sentences_exact", 1), *_TERSE], [_name("avoid"), _fixed("no_comma"), _fixed("quoted")]),
    ),
    "advise": Kind(
        (
            "Give advice to someone who wants to {activity}.",
            "How can one {activity}? Give a tip.",
            "What would you tell people who want to {activity}?",
        ),
        ([_fixed("you"), _fixed("exclaims"), _fixed("ends_question")], _SHORT, [*_TOPICAL, _fixed("no_comma")]),
    ),
    "describe": Kind(
        ("Describe {thing}.", "Paint a picture in words: {thing}.", "What does {thing} look like?"),
        ([_name("avoid"), _fixed("digit"), _word("avoid", "and", "is")], _SHORT, [*_TOPICAL, _fixed("no_comma")]),
    ),
    "question": Kind(
        ("{ask}", "A friend asks: {ask}", "Quick question: {ask}"),
        (_SHORT, [_word("keyword"), _two_keywords("both"), _name("twice")], [*_PLAIN, _fixed("asks")]),
    ),
}


def split_topics(topics: Sequence[Topic]) -> dict[str, Split]:
    """Topic name to split, 70/10/20 by the rank of the name's hash: prompts of a topic stay together."""
    ranked = sorted(topics, key=lambda topic: hashlib.sha256(f"{SEED} {topic.name}".encode()).hexdigest())
    splits: dict[str, Split] = {}
    reached = 0.0
    for split, fraction in _FRACTIONS:
        first, reached = round(reached * len(ranked)), reached + fraction
        splits.update({topic.name: split for topic in ranked[first : round(reached * len(ranked))]})
    return splits


def draft_prompts() -> list[Draft]:
    """All prompts with the checks they ask for; kinds go round the topics so that each is met equally often."""
    topics = load_topics()
    splits = split_topics(topics)
    kinds = list(KINDS)
    drafts = []
    for i, topic in enumerate(sorted(topics, key=lambda topic: (splits[topic.name], topic.name))):
        for j in range(PROMPTS_PER_TOPIC):
            kind = kinds[(i * PROMPTS_PER_TOPIC + j) * 5 % len(kinds)]
            drafts.append(_draft(topic, kind, splits[topic.name]))
    return drafts


def _draft(topic: Topic, kind: str, split: Split) -> Draft:
    prompt_id = f"{topic.name}-{kind}"
    random = Random(f"{SEED} prompt {prompt_id}")
    fact, fact2 = random.sample(topic.facts, 2)
    task = random.choice(KINDS[kind].tasks).format(fact=fact, fact2=fact2, **vars(topic))
    stated: list[Choice] = []
    while len(stated) < len(KINDS[kind].pools):
        stated = []
        for pool in KINDS[kind].pools:
            choice = random.choice(pool)(topic, random)
            if all(compatible(choice, other) for other in stated):
                stated.append(choice)
    return Draft(prompt_id, kind, topic, split, f"{task} {_ask(stated, random)}", tuple(stated))


def _ask(stated: Sequence[Choice], random: Random) -> str:
    """The stated checks as one sentence: "Use at most 30 words, mention yeast and avoid commas."."""
    requests = [choice.request(random) for choice in random.sample(stated, len(stated))]
    text = f"{', '.join(requests[:-1])} and {requests[-1]}" if len(requests) > 1 else requests[0]
    return f"{text[0].upper()}{text[1:]}."


_LISTS = {"bullets", "numbered"}
_LAYOUTS = {*_LISTS, "title", "json", "quoted", "postscript"}
# checks that cannot hold together, or would only by a trick
_CLASHES: tuple[tuple[set[str], set[str]], ...] = (
    (_LAYOUTS, _LAYOUTS),
    (_LISTS | {"title", "json", "postscript"}, {"sentences_exact", "sentences_max", "sentences_min"}),
    (_LISTS | {"title", "postscript"}, {"one_paragraph"}),
    ({"starts_with"}, _LAYOUTS - {"postscript"} | {"names_early", "lowercase", "starts_with"}),
    ({"lowercase"}, {"title", "json", "postscript"}),
    ({"ends_question"}, {"json", "postscript", "asks", "asks_nothing", "quoted"}),
    ({"ends_question"}, {"complete", "exclaims"}),  # the first says it already; the second fights for the last mark
    ({"asks"}, {"asks_nothing"}),
    ({"exclaims"}, {"no_exclaim"}),
    ({"filler"}, {"no_filler", "starts_with"}),
    ({"no_filler"}, {"starts_with"}),
    ({"you"}, {"no_you"}),
    ({"first_person"}, {"no_first_person"}),
    ({"digit"}, {"no_digit"}),
    ({"numbered"}, {"digit", "no_digit"}),
    ({"sentences_exact", "sentences_max"}, {"sentences_min", "sentences_exact"}),
    ({"names_early"}, {"json", "title"}),
    ({"words_max"}, {"words_max"}),
    ({"words_min"}, {"words_min"}),
)


def compatible(one: Choice, other: Choice) -> bool:
    """Whether one response can well meet both checks, and they do not ask the same."""
    if one.check == other.check and one.check not in {"keyword", "avoid"}:
        return False
    pair = (one.check, other.check)
    if any((pair[0] in a and pair[1] in b) or (pair[1] in a and pair[0] in b) for a, b in _CLASHES):
        return False
    if _words_of(one) & _words_of(other) and set(pair) != {"names_early", "keyword"}:
        return False
    counts = {choice.check: choice.slots.get("n", 0) for choice in (one, other)}
    if set(pair) == {"words_max", "words_min"}:
        return counts["words_min"] + 8 <= counts["words_max"]
    if set(pair) == {"words_min", "sentences_exact"}:
        return counts["words_min"] <= 12 * counts["sentences_exact"]
    if {*pair} & {"one_paragraph", "short_sentences"} and counts.get("sentences_exact") == 1:
        return False  # one sentence cannot break its line, and must not be both rich and short
    if set(pair) == {"words_max", "sentences_min"}:
        return counts["words_max"] >= 9 * counts["sentences_min"]
    return True


def _words_of(choice: Choice) -> set[str]:
    return {str(choice.slots[slot]).lower() for slot in ("word", "first", "second") if slot in choice.slots}


@dataclass(frozen=True)
class Finished:
    """A prompt with its whole rubric, the choices that it was made from, in the same order, and its exemplars.

    ``edits``: (generator, response), see `rubric_data.builtin.edits.exemplars`.
    """

    draft: Draft
    rubric: Rubric
    choices: tuple[Choice, ...]
    edits: tuple[tuple[str, str], ...] = ()

    @property
    def bench(self) -> Bench:
        """What the edits of this prompt work with."""
        return Bench(self.draft.prompt, self.draft.kind, self.draft.topic, self.rubric, self.choices)


_ATTEMPTS = 20
_LEAST_EDITS = 5  # exemplars of a prompt, the perfect one among them
# what any policy can learn to do, whatever the prompt; every rubric holds some
_LEARNABLE = frozenset(
    {
        "complete",
        "ends_question",
        "words_max",
        "no_comma",
        "sentences_exact",
        "sentences_max",
        "short_sentences",
        "one_paragraph",
        "short_words",
        "words_min",
        "sentences_min",
        "asks",
        "digit",
        "exclaims",
    }
)
_LEARNABLE_COUNT = 3
# what short responses meet more easily, and what long ones do: prompts mostly ask for brevity, so that without a
# counterweight the length of a response would tell most of its verdicts
_BRIEF = frozenset(
    {
        "words_max",
        "sentences_max",
        "short_sentences",
        "short_words",
        "complete",
        "no_comma",
        "avoid",
        "no_you",
        "no_first_person",
        "asks_nothing",
        "no_digit",
        "no_exclaim",
        "one_paragraph",
        "no_repeat",
    }
)
_AMPLE = frozenset({"words_min", "sentences_min", "keyword", "twice", "any_of", "both", "asks", "digit", "you"})
_COMMON = ("and", "is", "it", "can", "many", "that", "of", "also")
_AIM = 0.40  # of samples that meet a criterion: exemplars meet more, so that about half of all responses do


def _options(tag: str, draft: Draft, random: Random) -> list[Choice]:
    """Unstated checks of one family that make sense for the prompt."""
    topic, kind = draft.topic, draft.kind
    numbers: dict[str, dict[str, Sequence[int]]] = {
        "length": {"words_max": range(18, 45, 2), "words_min": range(16, 36, 2)},
        "sentences": {
            "short_sentences": range(10, 25, 2),
            "sentences_exact": (1, 2),
            "sentences_max": (2, 3),
            "sentences_min": (2, 3),
        },
        "style": {"short_words": (8, 9, 10, 11)},
    }
    plain: dict[str, tuple[str, ...]] = {
        "ending": ("complete",),
        "comma": ("no_comma",),
        "opening": ("no_filler", "filler"),
        "format": ("one_paragraph",),
        "person": ("you", "no_you", "first_person", "no_first_person"),
        "question": ("asks", "asks_nothing"),
        "digit": ("digit", "no_digit"),
        "style": ("exclaims", "no_exclaim", "no_repeat"),
    }
    found = [choose(check, n=random.choice(values)) for check, values in numbers.get(tag, {}).items() for _ in "123"]
    found += [choose(check) for check in plain.get(tag, ())]
    if tag == "keyword":
        found += [choose("keyword", word=word) for word in topic.keywords]
        found += [_two_keywords("any_of")(topic, random), choose("twice", word=topic.name)]
        found += [_both_names(topic, random)] if kind == "compare" else []
    if tag == "avoid":
        found += [choose("avoid", word=word) for word in (*_COMMON, *topic.keywords, topic.name)]
    if tag == "opening":
        found += [choose("names_early", word=topic.name, n=n) for n in (2, 3, 5, 8)]
    if tag == "style" and kind in {"rewrite", "summarise"}:
        found += [choose("no_copy", n=n) for n in (3, 4)]
    return found


def finish_rubrics(drafts: Sequence[Draft], samples: Mapping[str, Sequence[str]]) -> list[Finished]:
    """Fill every rubric up to six to eight criteria with unstated checks.

    ``samples``: prompt id -> its sampled responses. Families are drawn so that all are met often, and within a
    family the check that brings the family's share of met criteria nearest to its aim, so that the family
    alone says little about the verdict.
    """
    met: dict[str, list[float]] = {tag: [] for tag in sorted({check.tag for check in CHECKS.values()})}

    def share(choice: Choice, draft: Draft) -> float:
        # how many of the samples do well by the check: a pitfall counts where it is avoided
        texts = samples[draft.prompt_id]
        passed = sum(verify(choice.verifier, text, draft.prompt) for text in texts) / len(texts)
        return 1 - passed if CHECKS[choice.check].pitfall else passed

    for draft in drafts:
        for choice in draft.stated:
            met[choice.tag].append(share(choice, draft))
    finished = {}
    # in an order without meaning, so that the balance reached late is no matter of topic or split
    for draft in sorted(drafts, key=lambda draft: hashlib.sha256(draft.prompt_id.encode()).digest()):
        for attempt in range(_ATTEMPTS):
            random = Random(f"{SEED} rubric {draft.prompt_id} {attempt}")
            chosen = list(draft.stated)
            tally = {tag: list(shares) for tag, shares in met.items()}
            size = random.choice((6, 7, 7, 8))
            while len(chosen) < size:
                lacking = _LEARNABLE_COUNT - sum(choice.check in _LEARNABLE for choice in chosen)
                is_due = lacking >= size - len(chosen)
                chosen.append(_draw(draft, chosen, tally, share, random, _LEARNABLE if is_due else CHECKS))
                tally[chosen[-1].tag].append(share(chosen[-1], draft))
            one = _finish(draft, chosen, [share(choice, draft) for choice in chosen], random)
            edits = exemplars(one.bench, samples[draft.prompt_id], f"{SEED} edits {draft.prompt_id}")
            if len(edits) >= _LEAST_EDITS and edits[0][0] == PERFECT:
                break
        else:
            raise ValueError(f"{draft.prompt_id}: no rubric with a perfect response in {_ATTEMPTS} attempts")
        finished[draft.prompt_id], met = replace(one, edits=tuple(edits)), tally
    return [finished[draft.prompt_id] for draft in drafts]


def _draw(
    draft: Draft,
    chosen: Sequence[Choice],
    met: Mapping[str, Sequence[float]],
    share: Callable[[Choice, Draft], float],
    random: Random,
    allowed: Container[str],
) -> Choice:
    """One more of the allowed checks for the rubric: the family first, then the check."""
    while True:
        taken = [choice.tag for choice in chosen]
        # a family seldom met so far is likelier; a finished last sentence is asked of nearly every response
        weights = [(3.0 if tag == "ending" else 1.0) / (20 + len(met[tag])) / (1 + taken.count(tag)) for tag in met]
        if not any(choice.check == "words_min" for choice in chosen):
            weights[list(met).index("length")] *= 6
        tag = random.choices(list(met), weights)[0]
        options = [
            option
            for option in _options(tag, draft, random)
            if option.check in allowed and all(compatible(option, other) for other in chosen)
        ]
        if not options:
            continue

        def distance(option: Choice, tag: str = tag) -> float:
            passed = share(option, draft)
            after = (sum(met[tag]) + passed) / (len(met[tag]) + 1)
            # a check that all samples meet, or none, tells responses apart only by their edits
            lean = (option.check in _BRIEF) - (option.check in _AMPLE)
            drift = abs(after - _AIM) * len(met[tag])
            return drift + 0.3 * lean + 0.5 * abs(passed - _AIM) + 0.4 * (passed in (0.0, 1.0)) + 0.3 * random.random()

        return min(options, key=distance)


def _finish(draft: Draft, chosen: Sequence[Choice], shares: Sequence[float], random: Random) -> Finished:
    """The rubric in random order, with weights and now and then a veto; ``shares`` of samples that meet each check."""
    order = random.sample(range(len(chosen)), len(chosen))
    weights = [1.0, 2.0, 3.0, *random.choices((1.0, 2.0, 3.0), (4, 3, 2), k=len(order) - 3)]
    random.shuffle(weights)
    # a veto that most samples fail would make nearly every reward zero
    harmless = [i for i in order if shares[i] >= 0.5 and not CHECKS[chosen[i].check].pitfall]
    veto = random.choice(harmless) if harmless and random.random() < 0.12 else -1
    criteria = tuple(
        chosen[i].criterion(number, 1.0 if CHECKS[chosen[i].check].pitfall else weight, i == veto, random)
        for number, (i, weight) in enumerate(zip(order, weights, strict=True), start=1)
    )
    return Finished(draft, Rubric(criteria=criteria), tuple(chosen[i] for i in order))


@dataclass(frozen=True)
class Built:
    """The two data files, as their lines."""

    prompts: tuple[str, ...]
    responses: tuple[str, ...]


def build(samples: Mapping[str, Sequence[tuple[str, str]]]) -> Built:
    """The data files from the sampled (generator, response) of every prompt id; the same samples, the same files.

    Raises ValueError if a prompt gets no rubric that some response meets in full.
    """
    drafts = draft_prompts()
    texts = {prompt_id: [response for _, response in found] for prompt_id, found in samples.items()}
    prompts, responses = [], []
    for one in finish_rubrics(drafts, texts):
        draft = one.draft
        prompts.append(
            _line(
                prompt_id=draft.prompt_id,
                kind=draft.kind,
                split=draft.split,
                prompt=draft.prompt,
                rubric=one.rubric.model_dump(exclude_defaults=True),
            )
        )
        for number, (generator, response) in enumerate([*samples[draft.prompt_id], *one.edits]):
            responses.append(
                _line(
                    prompt_id=draft.prompt_id,
                    response_id=f"{draft.prompt_id}-{number:02d}",
                    generator=generator,
                    response=response,
                )
            )
    return Built(tuple(prompts), tuple(responses))


def _line(**fields: Any) -> str:
    return json.dumps(fields, ensure_ascii=False)
