import pytest

from benchmarks import speed
from rm.scorer import RubricScorer


@pytest.fixture
def tiny(monkeypatch, tiny_backbone):
    monkeypatch.setattr(speed, "MODEL", tiny_backbone)
    scorer = RubricScorer.zero_shot(tiny_backbone, dtype="float32", max_length=512)
    monkeypatch.setattr(speed, "_scorer", lambda: scorer)
    return speed.made_up("x", prompts=2, prompt=30, responses=3, response=40, criteria=4, criterion=10)


def test_made_up_work_has_the_sizes_asked_for(tiny):
    assert (len(tiny.prompts), len(set(tiny.prompts)), len(set(tiny.responses))) == (6, 2, 6)
    assert tiny.criteria == 24 == len(tiny.sequences)
    trees = tiny.trees(speed._scorer().encoder)
    assert [len(branch.criteria) for tree in trees for branch in tree.branches] == [4] * 6


def test_the_token_ratio_counts_what_each_side_reads(tiny):
    trees = tiny.trees(speed._scorer().encoder)
    separate = sum(
        len(tree.tokens) + len(branch.tokens) + len(criterion)
        for tree in trees for branch in tree.branches for criterion in branch.criteria
    )  # fmt: skip
    assert speed.token_ratio(tiny) == pytest.approx(separate / sum(tree.length for tree in trees), rel=0.02)


def test_a_baseline_gets_an_even_share_of_the_work():
    assert speed._evenly(list(range(10)), 4) == [0, 3, 6, 9]
    assert speed._evenly([1, 2], 4) == [1, 2]


def test_rates_are_questions_a_second_taken_in_turns(monkeypatch):
    clock = iter([0.0, 1.0, 1.0, 3.0, 3.0, 3.5, 3.5, 7.5])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    called = []
    first, second = (lambda name=name, n=n: called.append(name) or n for name, n in (("ours", 10), ("other", 8)))
    assert speed._rates(first, second, repeats=2) == ([10.0, 20.0], [4.0, 2.0])
    assert called == ["ours", "other"] * 3  # a warm-up, then in turns


def test_ours_and_every_alternative_that_needs_no_big_model_answer_all_they_are_given(tiny):
    assert speed.ours(tiny)() == 24
    assert speed.ours_training(tiny)() == 24


def test_the_table_quotes_records_with_their_targets():
    measured = {"median": 12.0, "q1": 11.0, "q3": 13.5}
    one = {
        "name": "speed-score-a-padded", "unit": "criteria / s", "result": measured, "ratio": 6.0,
        "baseline": {"name": "padded", "median": 2.0}, "config": {"target": "5.9"},
    }  # fmt: skip
    assert speed.table([one]).splitlines()[2:] == [
        "| `score-a-padded` | criteria / s | 12 [11 13.5] | 2 (padded) | 6.00 | 5.9 |"
    ]
