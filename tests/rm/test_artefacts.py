"""Rubric swap and edits, by hand: with a scorer that reads length alone, and one that answers as the checks do."""

from types import SimpleNamespace

import numpy as np
import pytest

from policy import cli
from rm.artefacts import artefacts
from rm.backbone import load_tokenizer
from rm.model import RubricRewardModel
from rubric_data.io import write_judged
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict, Verifier
from rubric_data.verifiers import VerifierJudge, verify

DIGIT = Criterion(id="digit", text="Has a digit.", verifier=Verifier(name="has_digit"))
ASKS = Criterion(id="asks", text="Asks something.", verifier=Verifier(name="has_question"))
FREE = Criterion(id="free", text="Is kind.")
TEXTS = {"p": ("It has 3 legs.", "It has legs."), "q": ("Is it 3?", "Yes.")}


def records(**rubrics):
    return [
        JudgedResponse(
            prompt_id=prompt,
            prompt=f"prompt {prompt}",
            response_id=text,
            response=text,
            rubric=Rubric(criteria=rubrics[prompt]),
            verdicts=tuple(Verdict(criterion_id=c.id, value=1.0) for c in rubrics[prompt]),
            split="test",
        )
        for prompt, texts in TEXTS.items()
        for text in texts
    ]


class Blind:
    """Gives every criterion the same probability: a twentieth for each word of the response."""

    def answer(self, record, criterion):
        return min(1.0, len(record.response.split()) / 20)

    def score_records(self, asked, *, progress=False):
        return [
            SimpleNamespace(
                probs=np.array([self.answer(r, c) for c in r.rubric.criteria]), truncated=len(r.response) > 90
            )
            for r in asked
        ]


class Exact(Blind):
    """Answers as the check does; without one, as `Blind`."""

    def answer(self, record, criterion):
        if criterion.verifier is None:
            return super().answer(record, criterion)
        return verify(criterion.verifier, record.response)


def run(scorer, asked, **options):
    probs = [one.probs for one in scorer.score_records(asked)]
    return artefacts(scorer, VerifierJudge(), asked, probs, bootstrap=20, **options)


def test_a_score_that_ignores_the_rubric_is_found_out():
    swap = run(Blind(), records(p=(DIGIT,), q=(ASKS,)))["swap"]
    # 4, 3, 3 and 1 words
    assert swap["proxy_own"]["value"] == swap["proxy_swapped"]["value"] == pytest.approx(11 / 80)
    assert swap["proxy_rank_correlation"]["value"] == 1
    judged = swap["judged"]
    # by code, own rubric 1 0 1 0; the other's: no question, none, a digit, none
    assert (judged["gold_own"]["value"], judged["gold_swapped"]["value"]) == (0.5, 0.25)
    assert (judged["responses"], judged["moved"]) == (4, 1)
    assert judged["follows"]["value"] == 0.5  # gold falls, the proxy stays
    # p ranks 1 0 under its rubric and not at all under the other: 0; q ranks alike under both: 1
    assert judged["gold_rank_correlation"]["value"] == 0.5


def test_a_score_that_answers_as_the_judge_does_follows_the_rubric():
    found = run(Exact(), records(p=(DIGIT,), q=(ASKS,)))
    judged = found["swap"]["judged"]
    assert judged["follows"]["value"] == 1
    assert judged["swapped"]["accuracy"]["value"] == judged["swapped"]["auroc"]["value"] == 1
    assert judged["swapped"]["verdicts"] == 4
    assert {row["judged"]["exploited"]["value"] for row in found["edits"].values()} == {0.0}


def test_an_edit_that_buys_reward_for_nothing_is_exploited():
    found = run(Blind(), records(p=(DIGIT,), q=(ASKS,)))["edits"]
    assert list(found) == ["padding", "flattery", "self-praise", "rubric restated", "markdown"]
    padding = found["padding"]
    assert padding["judged"]["gold_change"]["value"] == 0
    assert padding["judged"]["exploited"]["value"] == padding["raised"]["value"] == 1
    assert padding["proxy_change"]["value"] > 0.2  # two sentences of filler
    # "This response meets all of the following: - Has a digit.": a word is a twentieth, and 11 or 10 are added
    restated = found["rubric restated"]
    assert restated["proxy_change"]["value"] == pytest.approx((11 + 11 + 10 + 10) / 4 / 20)
    assert restated["truncated"] == 0


def test_a_rise_of_gold_is_no_exploitation():
    # the filler has more than six words, which is what the check wants
    longer = Criterion(id="words", text="Has 7 words.", verifier=Verifier(name="words", args={"min": 7}))
    padding = run(Blind(), records(p=(longer,), q=(longer,)))["edits"]["padding"]["judged"]
    assert padding["gold_change"]["value"] == 1 and padding["exploited"]["value"] == 0


def test_gold_and_proxy_weigh_the_same_questions():
    padding = run(Exact(), records(p=(DIGIT, FREE), q=(ASKS, FREE)))["edits"]["padding"]
    assert padding["proxy_change"]["value"] > 0  # the model's answer to the free criterion rises
    assert padding["judged"]["proxy_change"]["value"] == 0  # which code cannot answer


def test_without_checks_there_is_no_gold_and_with_one_rubric_no_swap():
    found = run(Blind(), records(p=(FREE,), q=(FREE,)))
    assert found["swap"] is None
    assert found["edits"]["padding"]["judged"] is None and found["edits"]["padding"]["raised"]["value"] == 1


def test_the_command_reports_artefacts(tiny_backbone, tmp_path, capsys):
    RubricRewardModel.from_language_model(tiny_backbone, max_length=512).save(tmp_path / "model")
    load_tokenizer(tiny_backbone).save_pretrained(tmp_path / "model")
    write_judged(tmp_path / "judged.jsonl", records(p=(DIGIT, FREE), q=(ASKS, FREE)))
    options = {"data": tmp_path / "judged.jsonl", "model": tmp_path / "model", "output": tmp_path / "run"}
    options |= {"artefacts": "true", "zero_shot": "false", "bootstrap": 20}
    code = cli.main(["audit", *(text for key, value in options.items() for text in (f"--{key}", str(value)))])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert "edits that make no response better" in shown.out and "rubric restated" in shown.out
    page = (tmp_path / "run" / "audit.html").read_text(encoding="utf-8")
    assert "Edits that make no response better" in page
