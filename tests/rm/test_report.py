import copy
import functools
import html.parser
import re
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from rm.artefacts import artefacts
from rm.audit import audit
from rm.report import artefact_table, render, summary_table
from rubric_data.records import Criterion, JudgedResponse, Level, Rubric, Verdict, Verifier
from rubric_data.verifiers import VerifierJudge

HOSTILE = (
    "<script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)> & \"quoted\" {{ 7 * 191 }} $x_1$"
)
FACTS = {
    "data": "builtin",
    "split": "test",
    "truncated_responses": 0,
    "rubrics_seen_in_training": 0,
    "rubrics": 3,
}
# of the two criteria: one that code answers, and one with levels
SORTS = ({"verifier": Verifier(name="has_digit")}, {"levels": tuple(Level(label=name) for name in "abc")})
SECTIONS = ("The ceiling", "By level", "Seen and unseen", "Does the score follow", "Edits that make")


def result(text=HOSTILE, name="<script>&amp;", values=((1.0, 0.0), (0.0, 1.0)), others=()):
    """An audit of two prompts with two responses each in which every free text is ``text``.

    ``others``: names of predictors to stand beside the model; the last gives rewards alone.
    """
    return copy.deepcopy(_result(text, name, values, others))


@functools.cache
def _result(text, name, values, others):
    records = [
        JudgedResponse(
            prompt_id=f"p{number}{text}",
            prompt=f"{number} {text}",
            response_id=f"r{number}{place}{text}",
            response=text,
            rubric=Rubric(
                criteria=tuple(
                    Criterion(id=f"c{i}{text}", text=text, tags=(text,), weight=1 + number, **SORTS[i])
                    for i in range(len(verdicts))
                )
            ),
            generator=text,
            verdicts=tuple(
                Verdict(criterion_id=f"c{i}{text}", value=value, human=value) for i, value in enumerate(verdicts)
            ),
            split="test",
        )
        for number in range(2)
        for place, verdicts in enumerate(values)
    ]
    probs = [np.linspace(0.2, 0.9, len(record.rubric.criteria)) * (1 - 0.1 * i) for i, record in enumerate(records)]
    facts = FACTS | {"model": text, "judges": [text]}
    predictions = {"model": probs, "model (raw)": probs, name: probs}
    predictions |= {other: [1 - one for one in probs] for other in others[:-1]}
    predictions |= {other: np.arange(len(records)) * -7.5 for other in others[-1:]}
    votes = [np.ones((len(found), 2)) for found in probs]
    audited = audit(records, predictions, others=others, train=records, votes=votes, bootstrap=20)
    edits = artefacts(Half(), VerifierJudge(), records, probs, bootstrap=20)
    facts["others"] = {other: text for other in others}
    return {"facts": facts} | audited | {"artefacts": edits}


class Half:
    """A scorer that says one half of everything."""

    def score_records(self, records, *, progress=False):
        return [SimpleNamespace(probs=np.full(len(r.rubric.criteria), 0.5), truncated=0) for r in records]


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page, and whether its tags close in order."""

    VOID = frozenset({"br", "meta", "path", "use"})

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@functools.cache
def plain_source():
    return render(result("plain", "plain"))


@pytest.fixture(scope="module")
def page():
    return Page(render(result()))


def test_hostile_texts_are_shown_and_never_obeyed(page):
    assert not {"script", "img"} & {*page.tags}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    # title, heading, judge, tag, generator, and the disagreements
    assert page.text.count(HOSTILE) > 10
    assert page.text.count("<script>&amp;") > 4  # predictor, in tables and plots
    assert "1337" not in page.text
    assert all(section in page.text for section in SECTIONS)


def test_page_is_whole_and_asks_nothing_of_the_network(page):
    assert page.open == []
    asking = [value for name, value in page.attributes if name in {"src", "href", "xlink:href", "srcset", "data"}]
    assert all(value.startswith("#") for value in asking)
    source = plain_source()
    assert "@import" not in source and "@font-face" not in source and "url(http" not in source
    assert {*re.findall(r"https?://[^\s\"'<>)]+", source)} <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_plots_are_inline_follow_the_page_and_have_ids_of_their_own(page):
    assert page.tags.count("svg") == 12
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len({*ids})
    source = plain_source()
    assert "currentColor" in source and "#0a0b0c" not in source
    used = {*re.findall(r'href="#([^"]+)"', source), *re.findall(r"url\(#([^)]+)\)", source)}
    assert used <= {*re.findall(r' id="([^"]+)"', source)}


def test_the_same_audit_gives_the_same_page():
    assert render(result("plain", "plain")) == plain_source()


def test_page_without_facts_and_with_undefined_numbers():
    """All verdicts met: no AUROC, no ordered pairs; the page says so with a dash."""
    bare = result("plain", "plain", values=((1.0,), (1.0,)))
    del bare["facts"], bare["artefacts"]
    bare |= {"ceiling": {}, "by_novelty": {}}
    assert bare["predictors"]["model"]["criterion"]["auroc"] == {"value": None, "low": None, "high": None}
    page = Page(render(bare))
    assert page.open == [] and "–" in page.text
    assert "None" not in page.text and not re.search(r"\bnan\b", page.text)
    assert not any(section in page.text for section in SECTIONS)  # there is nothing to say in them


def test_numbers_on_the_page_are_those_of_the_audit():
    audited = result("plain", "plain")
    auroc = audited["predictors"]["model"]["criterion"]["auroc"]
    text = Page(plain_source()).text
    assert f"Criterion AUROC{auroc['value']:.3f}[{auroc['low']:.2f}, {auroc['high']:.2f}]" in text


def test_long_texts_are_cut_on_the_page():
    text = Page(render(result("x" * 9000, "plain"))).text
    assert "x" * 9001 not in text and "(5000 more characters)" in text


def test_summary_table_fits_80_columns_and_takes_names_as_they_are():
    console = Console(width=80, record=True)
    console.print(summary_table(result("plain", "[red]overlap[/]")))
    printed = console.export_text()
    assert "2 prompts, 4 responses, 8 verdicts" in printed
    assert "[red]overlap[/]" in printed
    assert "[low high]: 95% interval, 20 resamples of prompts" in printed
    assert "…" not in printed


OTHERS = ("_$\\frac$ <b>", "scalar")  # a name that is markup, a formula, and hidden in a legend


def test_the_first_of_the_others_is_shown_side_by_side():
    source = render(result(others=OTHERS))
    page = Page(source)
    assert page.open == [] and "<b>" not in source.replace("<b>0", "").replace("<b>1", "")
    assert f"Side by side with {OTHERS[0]}" in page.text
    assert page.tags.count("svg") == 15 and " _$\\frac$ <b>" in page.text
    assert f"Beside {OTHERS[0]}, " in page.text and "Beside scalar, " in page.text
    assert "scalar (" in page.text and "answers no criteria and only ranks" in page.text


def test_one_that_gives_rewards_alone_has_dashes():
    page = Page(render(result("plain", "plain", others=("scalar",))))
    assert page.open == [] and page.tags.count("svg") == 14  # no reliability
    assert "None" not in page.text and not re.search(r"\bnan\b", page.text)
    assert "its rewards only rank" in page.text and "differs most" in page.text
    console = Console(width=80, record=True)
    console.print(summary_table(result("plain", "plain", others=("scalar",))))
    (line,) = [line for line in console.export_text().splitlines() if line.strip().startswith("scalar")]
    assert line.split()[1:4] == ["–", "–", "–"]


def estimated(value, low, high):
    return {"value": value, "low": low, "high": high}


def test_soft_verdicts_are_told_by_concordance():
    audited = result("plain", "plain") | {"soft": 3}
    for name, value in (("model", 0.8), ("plain", 0.7)):
        audited["predictors"][name]["criterion"]["concordance"] = estimated(value, 0.6, 0.9)
    audited["model_minus"]["plain"]["concordance"] = estimated(0.1, 0.05, 0.15)
    text = Page(render(audited)).text
    assert "It puts verdicts in the judge's order better than the strongest baseline, plain: concordance 0.800" in text
    assert "Criterion concordance0.800[0.60, 0.90]" in text and "Criterion AUROC" not in text
    assert "concordance" in [column.header for column in summary_table(audited).columns]


def test_an_audit_of_the_split_that_chose_the_model_says_so():
    audited = result("plain", "plain")
    for split, told in (("validation", True), ("test", False)):
        audited["facts"]["split"] = split
        assert ("the numbers flatter the model" in Page(render(audited)).text) == told
        assert ("the numbers flatter the model" in str(summary_table(audited).caption)) == told


def test_the_verdict_in_words():
    audited = result("plain", "plain", others=("scalar",))
    audited["predictors"]["model"]["criterion"] |= {
        "auroc": estimated(0.8, 0.75, 0.85),
        "ece": estimated(0.031, 0.02, 0.05),
    }
    audited["predictors"]["model"]["reward"]["tail_pair_accuracy"]["half"] = estimated(0.55, 0.45, 0.65)
    audited["predictors"]["plain"]["criterion"]["auroc"] = estimated(0.7, 0.6, 0.8)
    audited["model_minus"]["plain"]["auroc"] = estimated(0.1, 0.05, 0.15)
    audited["model_minus"]["scalar"] |= {
        "pair_accuracy": estimated(-0.1, -0.2, -0.05),
        "tail_pair_accuracy": estimated(0.1, -0.05, 0.2),
    }
    text = Page(render(audited)).text
    for words in (
        "better than the strongest baseline, plain: AUROC 0.800 against 0.700, +0.100 [+0.050, +0.150].",
        "it puts 55% [45%, 65%] of the pairs in the judge's order: not measurably better than chance.",
        "Its probabilities are 3.1 points off on average [2.0, 5.0] (ECE).",
        "Beside scalar, the model is behind in pair accuracy (−0.100 [−0.200, −0.050]); "
        "the two cannot be told apart in tail pair accuracy (+0.100 [−0.050, +0.200]).",
    ):
        assert words in text


def test_artefact_table_fits_80_columns():
    console = Console(width=80, record=True)
    console.print(artefact_table(result("plain", "plain")))
    printed = console.export_text()
    assert "rubric restated" in printed and "where gold moves the proxy follows" in " ".join(printed.split())
    assert "…" not in printed


def forecast(outcome="turns", low=0.5, high=1.0, **changes):
    kl = {"value": 0.75 if outcome == "turns" else None, "low": low, "high": high}
    turn = {"outcome": outcome, "kl": kl, "share": 0.4, "reach": 1.5} | changes
    return {"prompts": 30, "turn": turn}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (forecast(), "Gold is expected to turn at KL 0.75 [0.50, 1.00]: beyond it a policy loses the judge's reward."),
        (
            forecast("rises"),
            "Gold, the judge's reward, is not expected to turn up to KL 1.50, as far as these responses can tell.",
        ),
        (forecast("unclear"), "cannot be said of 30 prompts: it does in 40% of their resamples."),
        (
            forecast("unclear", share=None, reach=0.0),
            "Where gold, the judge's reward, turns cannot be told: too few responses",
        ),
    ],
)
def test_the_turn_in_words(found, words):
    audited = result("plain", "plain")
    audited["forecast"] |= found
    assert words in Page(render(audited)).text
    console = Console(width=80, record=True)
    console.print(summary_table(audited))
    assert words in " ".join(console.export_text().split())


def test_page_of_one_response_a_prompt_has_no_forecast():
    page = Page(render(result("plain", "plain", values=((1.0, 0.0),))))
    assert page.tags.count("svg") == 9 and "If a policy is trained" not in page.text
    assert "Where gold, the judge's reward, turns cannot be told" in page.text
