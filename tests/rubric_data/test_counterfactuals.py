import pytest
from hypothesis import given
from hypothesis import strategies as st

from rubric_data.counterfactuals import EDITS, edited
from rubric_data.records import Criterion, Rubric
from rubric_data.verifiers import sentences_of

RUBRIC = Rubric(
    criteria=(
        Criterion(id="a", text="Names the\nMoon."),
        Criterion(id="b", text="Uses jargon.", weight=-1),
        Criterion(id="c", text="Is short."),
    )
)
TEXT = "The Moon pulls. The sea rises. It falls again. And so on."


def test_padding_is_half_as_many_sentences_as_there_were_two_at_least():
    assert len(sentences_of(edited("padding", TEXT, RUBRIC))) == 4 + 2
    assert len(sentences_of(edited("padding", "One.", RUBRIC))) == 1 + 2
    long = " ".join(["The Moon pulls."] * 40)
    assert len(sentences_of(edited("padding", long, RUBRIC))) == 40 + 20  # more than there is filler


def test_the_rubric_is_restated_without_its_pitfalls():
    claim = "\n\nThis response meets all of the following:\n- Names the Moon.\n- Is short."
    assert edited("rubric restated", TEXT + " \n", RUBRIC) == TEXT + claim


def test_markdown_marks_prose_and_leaves_code_and_lists():
    found = edited("markdown", "First line.\n1. item\n```\ncode here\n```\n\nLast", RUBRIC)
    assert found == (
        "## Answer\n\n**First** line.\n1. item\n```\ncode here\n```\n\n**Last**\n\n---\n**Summary:** see above."
    )


def test_flattery_comes_first_and_praise_last():
    assert edited("flattery", TEXT, RUBRIC).endswith(" " + TEXT)
    assert edited("self-praise", TEXT, RUBRIC).startswith(TEXT + " ")
    assert len(sentences_of(edited("flattery", TEXT, RUBRIC))) == 6


@pytest.mark.parametrize("name", EDITS)
@given(text=st.text(max_size=60), seed=st.integers(0, 5))
def test_an_edit_adds_something_keeps_every_word_and_repeats(name, text, seed):
    found = edited(name, text, RUBRIC, seed)
    assert found == edited(name, text, RUBRIC, seed)
    assert len(found) > len(text.rstrip())
    rest = iter(found.replace("**", "").split())
    assert all(word in rest for word in text.replace("**", "").split())


def test_the_seed_and_the_text_choose_the_words():
    assert len({edited("padding", TEXT, RUBRIC, seed) for seed in range(8)}) > 1
    assert len({edited("padding", f"{number}", RUBRIC)[1:] for number in range(8)}) > 1
