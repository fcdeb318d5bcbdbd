"""Drills: extra checkable criteria for any response, answered exactly, half of them met.

A rubric's own criteria are few and share their fate: a good response meets most of them. A model can learn to
recognise good responses instead of reading the criterion. Drills ask a response about what has nothing to do with its
quality (a word, a count, a mark), met and missed equally often for every kind of check, so that only reading helps.
"""

from collections import Counter
from collections.abc import Sequence
from random import Random

from rubric_data.builtin.criteria import CHECKS, Choice, choose
from rubric_data.records import Criterion, Verdict
from rubric_data.verifiers import VerifierJudge, sentences_of, verify, words_of

_LEAD = 3  # how far met and missed drills of one kind may be apart
_TRIES = 200  # proposals for one drill
_LEAST_LETTERS = 3  # of a word that a drill asks for

Drill = tuple[Criterion, Verdict]


def drills(texts: Sequence[tuple[str, str]], count: int, seed: str) -> list[list[Drill]]:
    """``count`` drills for each (prompt, response), no check twice; fewer where the balance allows no more.

    The same texts, count and seed give the same drills. Their criteria have weight 1 and ids d1, d2 ...
    """
    random = Random(seed)
    vocabulary = sorted({word for _, response in texts for word in _nouns(response)}) or ["word"]
    met: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    found = []
    for prompt, response in texts:
        chosen: list[Drill] = []
        used: set[str] = set()
        for _ in range(_TRIES * count):
            if len(chosen) == count:
                break
            check = random.choice([name for name in CHECKS if name not in used])
            choice = _propose(check, response, vocabulary, random)
            value = verify(choice.verifier, response, prompt)
            tally, other = (met, missed) if value else (missed, met)
            if tally[check] >= other[check] + _LEAD:
                continue
            tally[check] += 1
            used.add(check)
            criterion = choice.criterion(len(chosen) + 1, 1.0, False, random)
            criterion = criterion.model_copy(update={"id": f"d{len(chosen) + 1}", "weight": 1.0})
            chosen.append((criterion, Verdict(criterion_id=criterion.id, value=value, judge=VerifierJudge.name)))
        found.append(chosen)
    return found


def _nouns(text: str) -> list[str]:
    """Words one may ask for: long enough, letters only, small."""
    return [word.lower() for word in words_of(text) if len(word) >= _LEAST_LETTERS and word.isalpha()]


def _propose(check: str, response: str, vocabulary: Sequence[str], random: Random) -> Choice:
    """The check with slots near what the response has, met or not."""
    own = _nouns(response) or ["word"]

    def word() -> str:
        return random.choice(own if random.random() < 0.5 else vocabulary)

    def near(number: int, spread: float = 0.4) -> int:
        return max(1, round(number * random.uniform(1 - spread, 1 + spread)))

    words, sentences = words_of(response), sentences_of(response)
    lengths = [len(words_of(sentence)) for sentence in sentences]
    numbers = {
        "words_max": lambda: near(len(words)),
        "words_min": lambda: near(len(words)),
        "sentences_exact": lambda: near(len(sentences)),
        "sentences_max": lambda: near(len(sentences)),
        "sentences_min": lambda: near(len(sentences)),
        "short_sentences": lambda: near(max(lengths, default=1)),
        "short_words": lambda: near(max(map(len, words), default=1), 0.3),
        "bullets": lambda: random.randint(1, 4),
        "numbered": lambda: random.randint(2, 4),
        "no_copy": lambda: random.randint(2, 5),
    }
    if check in numbers:
        return choose(check, n=numbers[check]())
    if check in ("keyword", "twice", "avoid"):
        return choose(check, word=word())
    if check == "starts_with":
        first = words[:1] if words and words[0].isalpha() else []
        return choose(check, word=random.choice([*first, *first, word().capitalize()]))
    if check == "names_early":
        return choose(check, word=word(), n=random.choice((2, 3, 5, 8, 12)))
    if check in ("any_of", "both"):
        return choose(check, first=word(), second=word())
    return choose(check)
