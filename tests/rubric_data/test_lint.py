"""Rules of the rubric linter: what each must find, and what each must leave alone."""

import json

import numpy as np
import pytest

from policy.cli import main
from rubric_data.builtin import load_builtin
from rubric_data.io import load_prompts, write_judged, write_prompts
from rubric_data.lint import lexical_similarity, lint_criterion, lint_prompts, lint_rubric, lint_verdicts
from rubric_data.records import Criterion, JudgedResponse, PromptRecord, Rubric, Verdict

FOUND = [
    # one demand a criterion
    ("atomic", "Identifies Washington as the first president and mentions that he served two terms."),
    ("atomic", "Does the response name a year and explain its meaning?"),
    ("atomic", "Names the Moon and uses an example."),
    ("atomic", "States the rule; gives an example of it."),
    ("atomic", "Mentions cost and/or time."),
    ("atomic", "Opens with a greeting as well as provides a date."),
    # complete in itself
    ("self-contained", "Matches the reference answer."),
    ("self-contained", "Covers the points listed above."),
    ("self-contained", "Is more detailed than the other response."),
    ("self-contained", "Has the example that Response A gives."),
    ("self-contained", "Contains every step of the reference."),
    ("self-contained", "Meets criterion 3 in the first paragraph."),
    # decided without looking anything up
    ("search", "States the current price of the ticket."),
    ("search", "Uses the latest figures."),
    ("search", "Cites a peer-reviewed study."),
    ("search", "Gives the correct capital of Canada."),
    ("search", "Is factually correct."),
    ("search", "Is up to date."),
    # yes = good
    ("polarity", "Fails to mention the Moon."),
    ("polarity", "The response does not explain why."),
    ("polarity", "Contains factual errors."),
    # words that mean nothing definite
    ("vague", "Uses an appropriate tone."),
    ("vague", "Is well-written."),
    ("vague", "Gives sufficient detail."),
    ("vague", "The advice is good."),
    ("vague", "Lists fruits, vegetables, etc."),
]
LEFT_ALONE = [
    "Mentions salt and pepper.",
    "Explains how trade and uses of salt changed.",
    "Lists fruits and names of towns.",
    'Contains the sentence "Stop and mentions it".',
    "Describes the search and rescue team.",
    "Says that water expands and is lighter when frozen.",
    "Keeps above 20 degrees all day, above all at night.",
    "Has a references section.",
    "Contrasts two responses to fear: flight and fight.",
    "Describes the current through a wire.",
    "Says that the current flows from plus to minus.",
    "Arrives at the latest by noon.",
    "Gives the correct capital of Canada, Ottawa.",
    "States the right year, 1969.",
    'Gives the correct name "Ada Lovelace".',
    "Mentions the source of the Nile.",
    "Does not use the word very.",
    "Is written without any comma.",
    "Asks no question.",
    "Does not provide a dosage.",
    "Begins and ends with a double quotation mark.",
    'Does not address the reader as "you".',
    "Uses an engaging opening by asking a question.",
    "Explains when a doubt is reasonable doubt: one that a fair person would have.",
    "Says that a condition is necessary and sufficient.",
    "Advises engaging in exercise.",
    "Has a greeting that is appropriate for a child: no surname, no title.",
]


def rules(text, weight=1.0):
    return [rule for rule, _, _ in lint_criterion(Criterion(id="c", text=text, weight=weight))]


@pytest.mark.parametrize(("rule", "text"), FOUND)
def test_a_fault_is_found(rule, text):
    assert rule in rules(text)


@pytest.mark.parametrize("text", LEFT_ALONE)
def test_a_sound_criterion_is_left_alone(text):
    assert rules(text) == []


def test_praise_with_a_negative_weight_and_a_pitfall_without_fault():
    assert rules("Avoids jargon.", weight=-1) == ["polarity"]
    assert rules("Clearly states the rule.", weight=-2) == ["polarity"]
    assert rules("Fails to mention the Moon.", weight=-1) == []
    assert rules("Contains factual errors.", weight=-1) == []


def rubric(*texts, weights=None):
    weights = weights or [1.0, 2.0] + [1.0] * len(texts)
    return Rubric(
        criteria=tuple(
            Criterion(id=f"c{n}", text=text, weight=weight)
            for n, (text, weight) in enumerate(zip(texts, weights, strict=False), start=1)
        )
    )


def found(*texts, weights=None, **options):
    return [(f.criterion_id, f.rule, f.severity) for f in lint_rubric("p", rubric(*texts, weights=weights), **options)]


SOUND = ("Names the Moon.", "Has at most 40 words.", "Asks a question.")


@pytest.mark.parametrize(
    ("one", "other", "severity"),
    [
        ("Names the Moon as the cause of tides.", "Names the Moon as the cause of tides", "error"),
        ("Names the Moon as the cause.", "Names the Moon as the cause of tides.", "warning"),
        ("The response mentions the Moon's pull.", "Mentions the pull of the Moon.", "warning"),
        ("Mentions apples in the list.", "Mentions pears in the list.", None),
        ("Has at least 2 sentences.", "Has at least 3 sentences.", None),
        ("Uses the word 'tide' somewhere.", "Uses the word 'moon' somewhere.", None),
        ("Never uses the word is.", "Never uses the word and.", None),
        ("Uses commas in the list.", "Uses no commas in the list.", None),
    ],
)
def test_near_duplicates_but_not_their_like(one, other, severity):
    expected = [("c4", "overlap", severity)] if severity else []
    pair = [item for item in found("Asks a question.", "Has at most 40 words.", one, other) if item[1] == "overlap"]
    assert pair == expected


def test_a_given_similarity_decides_alone():
    """Embeddings would see that these say the same; their letters do not."""
    alike = np.eye(3)
    alike[0, 2] = alike[2, 0] = 0.9
    assert found(*SOUND, similarity=alike, by_words=False) == [("c3", "overlap", "warning")]
    assert found(*SOUND, similarity=alike, by_words=False, overlap=0.95) == []
    prompts = [PromptRecord(prompt_id="p", prompt="?", rubric=rubric(*SOUND))]
    assert [f.rule for f in lint_prompts(prompts, similarity=lambda texts: alike)] == ["overlap"]


def test_lexical_similarity_is_a_cosine():
    same = lexical_similarity(["abc def", "abc def", "xyz"])
    assert same[0, 1] == pytest.approx(1) and same[0, 2] == 0 and np.allclose(same, same.T)
    assert lexical_similarity(["??", "!"]).tolist() == [[1, 0], [0, 1]]
    # " abc " and " abd " share of their grams of 3 to 5 characters " ab" alone: 1 of 6 each
    assert lexical_similarity(["abc", "abd"])[0, 1] == pytest.approx(1 / 6)


def test_weights_and_count():
    assert found(*SOUND, weights=[3, 3, 3]) == [(None, "weights", "warning")]
    assert found(*SOUND, weights=[1, 1, 1]) == []  # no weights at all is a choice
    assert found(*SOUND, weights=[0.5, 5, -3]) == [("c1", "weights", "warning"), ("c2", "weights", "warning")]
    assert found(*SOUND, weights=[10, 5, 1], max_weight=10) == []
    veto = Criterion(id="v", text="Does not flatter.", weight=0.01, veto=True)
    assert lint_rubric("p", Rubric(criteria=(*rubric(*SOUND).criteria, veto))) == []
    assert found(*SOUND[:2]) == [(None, "count", "warning")]
    many = [f"Mentions {chr(97 + n // 6)}{n}{n}." for n in range(31)]
    assert found(*many) == [(None, "count", "warning")]


def responses(*rows):
    shared = rubric(*SOUND)
    return [
        JudgedResponse(
            prompt_id="p",
            prompt="?",
            response_id=str(number),
            response=str(number),
            rubric=shared,
            verdicts=tuple(
                Verdict(criterion_id=f"c{place}", value=value)
                if value is not None
                else Verdict(criterion_id=f"c{place}", masked="timeout: x")
                for place, value in enumerate(row, start=1)
            ),
        )
        for number, row in enumerate(rows)
    ]


def test_criteria_that_everybody_meets_are_reported():
    # c1: all of 5; c2: 4 of 5; c3: none, but only 4 were answered
    judged = responses((1, 1, 0), (1, 1, 0), (1, 1, 0), (1, 1, 0), (1, 0, None))
    assert [(f.criterion_id, f.rule) for f in lint_verdicts(judged)] == [("c1", "pass-share")]
    assert lint_verdicts(judged)[0].message.startswith("met by 100% of 5 responses")


def test_the_embedded_rubrics_are_sound():
    prompts = load_prompts("builtin")
    assert lint_prompts(prompts) == []
    assert len(prompts) == len({record.prompt_id for record in load_builtin()})


def test_the_command_prints_what_it_found_and_obeys_no_markup(tmp_path, capsys):
    odd = rubric("Is [bold]helpful[/bold].\x1b[2J", "Has at most 40 words.", "Asks a question.")
    write_prompts(tmp_path / "p.jsonl", [PromptRecord(prompt_id="p1", prompt="?", rubric=odd)])
    judged = responses((1, 1, 0), (1, 1, 0), (1, 1, 0), (1, 1, 0), (1, 0, None))
    write_judged(tmp_path / "judged.jsonl", judged)
    options = ["--verdicts", str(tmp_path / "judged.jsonl"), "--output", str(tmp_path / "found.json")]
    assert main(["rubric", "lint", "--data", str(tmp_path / "p.jsonl"), *options]) == 0
    out = capsys.readouterr().out
    assert "[bold]helpful[/bold]" in out.replace("\n", "") and "\x1b[2J" not in out
    assert "by_rule: vague 1, pass-share 1\npass_share: looked_at 2, too_few_verdicts 1\n" in out
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["rubrics"] == 1 and [finding["rule"] for finding in written["findings"]] == ["vague", "pass-share"]


def test_verdicts_are_missed_where_there_are_none(tmp_path, capsys):
    write_judged(tmp_path / "r.jsonl", [one.model_copy(update={"verdicts": ()}) for one in responses((1, 1, 0))])
    path = str(tmp_path / "r.jsonl")
    assert main(["rubric", "lint", "--data", path, "--verdicts", path]) == 2
    assert f"{path}: holds no verdicts; run 'rubric-rm judge --data {path}' first" in capsys.readouterr().err


def test_prompts_without_rubrics_are_counted(tmp_path, capsys):
    write_prompts(tmp_path / "p.jsonl", [PromptRecord(prompt_id="p1", prompt="?")])
    assert main(["rubric", "lint", "--data", str(tmp_path / "p.jsonl")]) == 0
    assert "without_rubric: 1" in capsys.readouterr().out
    assert main(["rubric", "lint", "--data", str(tmp_path / "p.jsonl"), "--overlap", "2"]) == 2
