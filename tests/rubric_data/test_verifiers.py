from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rubric_data.errors import UserError
from rubric_data.judges import JudgeRequest
from rubric_data.records import Criterion, Verdict, Verifier
from rubric_data.verifiers import (
    VerifierJudge,
    check_names,
    prepare,
    sentences_of,
    verify,
    words_of,
)


def passes(name, response, prompt="", **args):
    return verify(Verifier(name=name, args=args), response, prompt)


# name, arguments, a response that passes, a response that does not
CASES = [
    ("words", {"max": 3}, "one two three", "one two three four"),
    ("words", {"min": 3}, "one e-mail", "one mail"),  # a hyphen parts words
    ("words", {"min": 2, "max": 3}, "two words", "one"),
    ("sentences", {"min": 2, "max": 2}, "Rain falls. It stops!", "Rain falls and it stops."),
    ("sentences", {"max": 1}, "Mr. Lee saw 3.5 metres of snow", "Lee saw snow. It melted"),
    ("sentences", {"min": 3}, "- One\n- Two\n- Three", "One and two. Three."),
    ("max_sentence_words", {"max": 4}, "The sun is up. Birds sing.", "The sun is up today."),
    ("max_word_length", {"max": 5}, "Small words, 1234567!", "Longer words"),
    ("no_repeated_sentence", {}, "Rain falls. Snow falls.", "Rain falls. Snow. rain falls!"),
    ("mention_any", {"words": ["bee", "queen bee"]}, "A Queen bee!", "Bees and queens"),
    ("mention_early", {"word": "Tea", "within": 3}, "I like tea.", "Most people like tea."),
    ("no_phrase", {"phrases": ["great question"]}, "A great many questions.", "Great! Question one."),
    ("no_phrase", {"phrases": ["tea", "so be it"], "within": 3}, "I do like tea.", "So, be it"),
    ("no_quote", {"texts": ["Names the cause of tides."], "words": 3}, "The cause: tides.", "It names the cause."),
    ("no_flattery", {}, "A sharp knife. A pan. What a great question!", "Hm. You clearly have a sharp eye."),
    ("no_flattery", {}, "You are asked a question.", "It is a pleasure to help."),
    (
        "no_self_praise",
        {},
        "The answer is 42. This response of yours is late.",
        "This is all. Every requirement was met.",
    ),
    ("no_self_praise", {}, "My summary is short.", "My short summary is quite complete."),
    ("at_most", {"measure": "words", "max": 2}, "Two words", "Two words more"),
    ("at_most", {"measure": "bold", "max": 1}, "**One**, 2 ** 3 ** 4", "**One** and **two**"),
    ("at_most", {"measure": "capitals", "max": 0.25}, "Abcd 1", "ABcd"),
    ("at_most", {"measure": "digits", "max": 0}, "one", "1"),
    ("at_most", {"measure": "emoji", "max": 0}, "fine :)", "fine 🙂"),
    ("at_most", {"measure": "exclamation_marks", "max": 1}, "Oh!", "Oh!!"),
    ("at_most", {"measure": "headings", "max": 0}, "#tag", "# Title"),
    ("at_most", {"measure": "list_items", "max": 1}, "- one\nand -more", "- one\n2. two"),
    # of the runs a b a, b a b, a b a, b a b two stood there before
    ("at_most", {"measure": "repetition", "max": 0.4}, "a b a b", "a b a b a b"),
    ("addresses_reader", {}, "Wash your hands.", "Wash the hands of youth."),
    ("addresses_nobody", {}, "Wash the hands of youth.", "YOU wash."),
    ("first_person", {}, "That is my boat.", "That is his boat in India."),
    ("no_first_person", {}, "That is his boat in India.", "I'm here."),
    ("starts_with", {"words": ["Dear", "Hi"]}, "  dear Tom", "Dearest Tom"),
    ("opening_filler", {}, '"Sure, I can."', "I am sure."),
    ("opening_filler", {}, "Well, tea.", "Well water is cold."),  # an empty word needs its comma
    ("opening_not_filler", {}, "Great owls hunt.", "Great! Owls hunt."),
    ("ends_complete", {}, 'She said "go!"', "She went and"),
    ("ends_complete", {}, '{"answer": "Yes."}', "1. Done.\n2."),  # a list marker closes nothing
    ("has_question", {}, "Why? Because.", "Because."),
    ("no_question", {}, "Because.", "Why? Because."),
    ("has_exclamation", {}, "Oh! Yes.", "Oh. Yes."),
    ("no_exclamation", {}, "Oh. Yes.", "Oh! Yes."),
    ("has_digit", {}, "It has 2 wings.", "It has two wings."),
    ("no_digit", {}, "It has two wings.", "It has 2 wings."),
    ("lowercase", {}, "all small, 3 words.", "all but One"),
    ("lowercase", {}, "é", "123"),  # no letters, no lower case
    ("numbered_list", {"items": 2}, "Steps:\n1. Go\n 2) Stop", "1. Go\n2. Stop\n3. Rest"),
    ("numbered_list", {"items": 2}, "1. a\n2. b", "1. Go\n3. Stop"),
    ("numbered_list", {"items": 1}, "1. Go", "1.\n"),  # an item needs some text
    ("one_paragraph", {}, "\nOne line. And more.\n", "One line.\nTwo lines."),
    ("ifeval:combination:repeat_prompt", {"prompt_to_repeat": "Why?"}, "why? Because.", "Because. Why?"),
    ("ifeval:combination:two_responses", {}, "Yes.******No.", "Yes. No."),
    ("ifeval:detectable_content:number_placeholders", {"num_placeholders": 1}, "Dear [name],", "Dear Tom,"),
    ("ifeval:detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. Write!", "Bye. PS write!"),
    ("ifeval:detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    ("ifeval:detectable_format:json_format", {}, '{"a": [1, 2]}', "{'a': 1}"),
    (
        "ifeval:detectable_format:multiple_sections",
        {"section_spliter": "Part", "num_sections": 2},
        "Part 1 a Part 2 b",
        "Part 1 a",
    ),
    ("ifeval:detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n- b\n- c"),
    ("ifeval:detectable_format:number_highlighted_sections", {"num_highlights": 1}, "a *big* cat", "a big cat"),
    ("ifeval:detectable_format:title", {}, "<<Tea>>\nIt is hot.", "<Tea>\nIt is hot."),
    ("ifeval:keywords:existence", {"keywords": [r"\bsea\b", "moon"]}, "Moon over Sea", "moon over seas"),
    ("ifeval:keywords:forbidden_words", {"forbidden_words": ["sea"]}, "the seas", "the Sea"),
    ("ifeval:keywords:frequency", {"keyword": "ha", "frequency": 2, "relation": "at least"}, "Haha", "ha"),
    (
        "ifeval:keywords:letter_frequency",
        {"letter": "z", "let_frequency": 2, "let_relation": "less than"},
        "zoo",
        "zigzag",
    ),
    (
        "ifeval:length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "One.\n\nThen two.",
        "One.\n\nTwo.",
    ),
    ("ifeval:length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n***\nTwo.", "One. Two."),
    ("ifeval:length_constraints:number_words", {"num_words": 2, "relation": "at least"}, "two words", "one"),
    ("ifeval:punctuation:no_comma", {}, "Red and blue.", "Red, blue."),
    ("ifeval:startend:end_checker", {"end_phrase": "?"}, 'He asked "why?"', "Why? Because."),
    ("ifeval:startend:quotation", {}, '"All of it."', '"Part" of it.'),
]


@pytest.mark.parametrize(("name", "args", "good", "bad"), CASES)
def test_a_check_tells_right_from_wrong_and_an_empty_response_passes_none(name, args, good, bad):
    assert passes(name, good, **args) == 1.0
    assert passes(name, bad, **args) == 0.0
    assert passes(name, " \n", **args) == 0.0


def test_every_name_is_tried_above_or_below():
    assert {case[0] for case in CASES} | {"no_copy"} == set(check_names())


def test_no_copy_compares_runs_of_words_with_the_prompt():
    prompt = "Rewrite this: The red fox jumps."
    assert passes("no_copy", "A fox jumps; the red one!", prompt, words=3) == 1.0
    assert passes("no_copy", "Look, the RED fox sleeps.", prompt, words=3) == 0.0
    assert passes("no_copy", "Look, the RED fox sleeps.", prompt, words=4) == 1.0


def test_sentences_are_split_as_documented():
    text = 'Dear Sam, I met Dr. Lee. She said "Go!" Then we left\n1. One thing.\n2. Two... three? P.S. bye\n*** 7'
    assert list(sentences_of(text)) == [
        "Dear Sam, I met Dr. Lee.",
        'She said "Go!"',
        "Then we left",
        "One thing.",
        "Two...",
        "three?",
        "P.S. bye",
    ]
    assert sentences_of("I chose vitamin C. ") == ("I chose vitamin C.",)


@given(st.text())
def test_splitting_loses_no_word_of_prose(text):
    prose = " ".join("".join(letter if letter.isalpha() else " " for letter in text).split())
    found = [word for sentence in sentences_of(prose) for word in words_of(sentence)]
    assert found == list(words_of(prose))


@given(st.text())
def test_opposites_split_every_text_that_is_not_empty(text):
    for one, other in [
        ("addresses_reader", "addresses_nobody"),
        ("first_person", "no_first_person"),
        ("has_digit", "no_digit"),
        ("has_question", "no_question"),
        ("has_exclamation", "no_exclamation"),
        ("opening_filler", "opening_not_filler"),
    ]:
        assert passes(one, text) + passes(other, text) == float(bool(text.strip()))


@given(st.lists(st.sampled_from(["rain", "e-mail", "don't", "3.5", "Tom's", "a_b", "é"]), min_size=1, max_size=9))
def test_words_are_counted_as_the_library_counts_them(parts):
    text = " ".join(parts)
    for limit in (3, 6):
        args = {"num_words": limit, "relation": "at least"}
        at_least = passes("ifeval:length_constraints:number_words", text, **args)
        assert passes("words", text, min=limit) == at_least
        assert passes("words", text, max=limit - 1) == 1 - at_least


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("sentence", {}, "verifier 'sentence': no such check; did you mean 'sentences'?"),
        ("ifeval:punctuation:no_coma", {}, "did you mean 'ifeval:punctuation:no_comma'?"),
        ("ifeval:has_digit", {}, "no such check"),
        ("sentences", {"maximum": 2}, "argument 'maximum': .* it takes: min, max"),
        ("sentences", {"max": "2"}, "argument 'max'"),
        ("words", {"max": 0}, "argument 'max': input should be greater than or equal to 1"),
        ("mention_any", {"words": []}, "argument 'words'"),
        ("starts_with", {"words": [" "]}, r"argument 'words\.0'"),
        ("max_word_length", {}, "argument 'max': field required"),
        ("has_digit", {"count": 2}, "it takes: none"),
        ("ifeval:keywords:existence", {}, "takes exactly the arguments keywords, got none; give them all"),
        ("ifeval:keywords:existence", {"keywords": []}, "argument 'keywords' is out of range"),
        ("ifeval:keywords:existence", {"keywords": ["("]}, "unfit arguments"),
        ("ifeval:detectable_format:number_bullet_lists", {"num_bullets": -1}, "argument 'num_bullets' is out of range"),
        (
            "ifeval:length_constraints:number_words",
            {"num_words": 3, "relation": "at most"},
            "unfit arguments .* see the if-verifiable library",
        ),
    ],
)
def test_a_misused_verifier_is_the_users_error_in_one_line(name, args, message):
    with pytest.raises(UserError, match=message) as raised:
        passes(name, "Some text.", **args)
    assert "\n" not in str(raised.value)


def test_deep_json_is_not_met_instead_of_a_crash():
    assert passes("ifeval:detectable_format:json_format", "[" * 200_000) == 0.0


def test_prepare_gives_what_verify_gives():
    verifier = Verifier(name="words", args={"max": 2})
    test = prepare(verifier)
    assert [test(text, "") for text in ("", "a b", "a b c")] == [False, True, False]


def test_the_judge_answers_in_order_and_masks_what_has_no_verifier():
    criteria = (
        Criterion(id="short", text="Is short.", verifier=Verifier(name="words", args={"max": 2})),
        Criterion(id="kind", text="Is kind."),
        Criterion(id="asks", text="Asks.", verifier=Verifier(name="has_question")),
    )
    judge = VerifierJudge()
    answers = judge.judge([JudgeRequest("P", text, criteria) for text in ("Why not?", "This is long.", "")])
    reason = "no_verifier: the criterion names no programmatic check"
    masked = Verdict(criterion_id="kind", masked=reason, judge="verifier")
    assert [tuple(verdict.value for verdict in row) for row in answers] == [
        (1.0, None, 1.0),
        (0.0, None, 0.0),
        (0.0, None, 0.0),
    ]
    assert all(row[1] == masked for row in answers)


def test_the_judge_names_the_criterion_whose_verifier_is_misused():
    criteria = (Criterion(id="c9", text="T.", verifier=Verifier(name="no_such")),)
    with pytest.raises(UserError, match="criterion 'c9': verifier 'no_such': no such check"):
        VerifierJudge().judge([JudgeRequest("P", "R", criteria)])


def test_the_template_names_the_versions_that_decide():
    assert VerifierJudge.template == f"checks-1/if-verifiable-{version('if-verifiable')}"


def test_the_docs_list_every_check():
    text = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [name for name in check_names() if f"`{name}`" not in text] == []
