import math

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from rm.data import TokenBudgetSampler, budget_batches, build_trees, collate, judged_pairs, load_exact, load_judged
from rm.encoding import Encoder
from rubric_data.errors import UserError
from rubric_data.io import write_judged
from rubric_data.records import Criterion, Rubric, Verdict, Verifier


@pytest.fixture
def encoder(tiny_backbone):
    return Encoder(AutoTokenizer.from_pretrained(tiny_backbone), 512)


def test_judged_pairs_by_hand():
    # 0.9 and 0.8 are the tail; 0.8 ties with 0.8; NaN has no order
    rewards, tail = [0.8, 0.9, 0.1, math.nan, 0.8], [True, True, False, False, True]
    assert judged_pairs(rewards, tail, 3.0) == [(1, 0, 3.0), (0, 2, 1.0), (1, 2, 1.0), (1, 4, 3.0), (4, 2, 1.0)]


def test_rewards_that_differ_by_rounding_make_no_pair(judged, encoder):
    rubric = Rubric(criteria=tuple(Criterion(id=f"c{k}", text=f"asks {k}", weight=k / 10) for k in (1, 2, 3)))

    def record(number, *values):
        verdicts = tuple(
            Verdict(criterion_id=c.id, value=v, masked="refusal" if v is None else None)
            for c, v in zip(rubric.criteria, values, strict=True)
        )
        return judged[0].model_copy(update={"rubric": rubric, "response": f"answer {number}", "verdicts": verdicts})

    # the second and third .3 / .6 either way, as floats .5 and .4999999999999999; the tail is two, and what ties
    answers = [(1, 1, 1), (1, 1, 0), (0, 0, 1), (0, 1, 0), (None, None, None)]
    records = [record(number, *values) for number, values in enumerate(answers)]
    (tree,) = build_trees(records, encoder, responses_per_tree=8, seed=0)
    order = np.argsort(tree.places)
    assert np.array(tree.tail)[order].tolist() == [True, True, True, False, False]
    np.testing.assert_array_equal(np.array(tree.rewards)[order], [1, 0.5, 0.5, 0.333333333, np.nan])
    pairs = collate([tree], tail_weight=3.0)["pairs"].tolist()
    told_apart = [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    assert sorted((tree.places[better], tree.places[worse]) for better, worse in pairs) == told_apart


def test_trees_keep_every_verdict_beside_its_text(judged, encoder):
    trees = build_trees(judged, encoder, responses_per_tree=8, seed=0)
    assert [len(tree.tree.branches) for tree in trees] == [2] * 6
    for tree in trees:
        for branch, (fruit, short) in zip(
            tree.tree.branches, zip(tree.values[::2], tree.values[1::2], strict=True), strict=True
        ):
            pear = "pear" in encoder.tokenizer.decode(branch.tokens)
            assert (fruit, short) == (float(pear), 1.0)
        assert sorted(tree.rewards) == [pytest.approx(1 / 3), 1.0]  # weights 2 and 1
    assert [len(tree.tree.branches) for tree in build_trees(judged, encoder, responses_per_tree=1, seed=0)] == [1] * 12


def test_drills_are_asked_beside_the_rubric_and_count_for_nothing_but_themselves(judged, encoder):
    drill = (Criterion(id="d1", text="Says so.", veto=True), Verdict(criterion_id="d1", value=0.0))
    plain, drilled = (
        build_trees(judged, encoder, responses_per_tree=8, seed=0, drilled=more)
        for more in (None, [[drill]] * len(judged))
    )
    for one, other in zip(plain, drilled, strict=True):
        assert other.sizes == [size + 1 for size in one.sizes]
        assert [value for i, value in enumerate(other.values) if i % 3 < 2] == one.values  # two criteria, one drill
        assert other.values[2::3] == [0.0] * len(one.sizes)
        assert other.weights[2::3] == [0.0] * len(one.sizes) and not any(other.veto)
        assert (other.rewards, other.tail) == (one.rewards, one.tail)
        assert [len(branch.criteria) for branch in other.tree.branches] == other.sizes
    with pytest.raises(ValueError, match="zip"):
        build_trees(judged, encoder, responses_per_tree=8, seed=0, drilled=[[drill]])


def test_collate_counts_masks_and_offsets(judged, encoder):
    masked = judged[0].model_copy(
        update={"verdicts": (Verdict(criterion_id="fruit", masked="timeout: 3 s"), judged[0].verdicts[1])}
    )
    trees = build_trees([masked, *judged[1:4]], encoder, responses_per_tree=8, seed=0)
    batch = collate(trees, tail_weight=5.0)
    assert batch["input_ids"].shape == batch["position_ids"].shape == (1, sum(tree.tree.length for tree in trees))
    assert (batch["labels"] == -100).sum() == 1
    assert batch["response"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    # all pairs differ: the masked response is worth 1 (short alone), its rival 1/3
    better, worse = batch["pairs"].T
    rewards = torch.tensor([reward for tree in trees for reward in tree.rewards])
    assert (rewards[better] > rewards[worse]).all()
    assert batch["pair_weights"].tolist() == [3.0, 4.0]  # one pair a tree, worth its verdicts


def test_budget_batches_by_hand():
    assert list(budget_batches([3, 3, 5, 9, 1], 6)) == [[0, 1], [2], [3], [4]]


def test_sampler_gives_every_process_as_much_and_a_new_order_every_epoch():
    lengths = [40, 10, 30, 20, 50, 60, 10, 10, 30, 25]
    sampler = TokenBudgetSampler(lengths, 80, seed=1, processes=2)
    first = list(sampler)
    assert len(first) == len(sampler) and len(sampler) % 2 == 0
    assert all(sum(lengths[index] for index in batch) <= 80 for batch in first)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert sorted(index for batch in TokenBudgetSampler(lengths, 80, seed=1) for index in batch) == list(range(10))
    with pytest.raises(ValueError, match="do not feed 8 processes"):
        TokenBudgetSampler(lengths, 10_000, seed=1, processes=8)


def test_the_order_changes_with_the_epoch_for_several_processes_too():
    sampler = TokenBudgetSampler([10] * 8, 10, seed=1, processes=2)
    loader = DataLoader(range(8), batch_sampler=sampler, collate_fn=list)
    shares = [prepare_data_loader(loader, num_processes=2, process_index=k, even_batches=False) for k in range(2)]
    orders = []
    for epoch in range(2):
        for share in shares:
            share.set_epoch(epoch)
        orders.append([index for share in shares for batch in share for index in batch])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(8)) and orders[0] != orders[1]


def test_data_without_verdicts_is_refused(judged, tmp_path):
    path = tmp_path / "bare.jsonl"
    write_judged(path, [record.model_copy(update={"verdicts": ()}) for record in judged])
    with pytest.raises(UserError, match="holds no verdicts; run 'rubric-rm judge"):
        load_judged(str(path))


def test_exact_verdicts_decide_rewards_and_pairs(judged, encoder, tmp_path):
    """Weights 2 (the judge's) and 1 (a check that the file answers wrongly, or not at all)."""
    digit = Criterion(id="digit", text="Has no digit.", verifier=Verifier(name="no_digit"))
    rubric = Rubric(criteria=(judged[0].rubric.criteria[0], digit))

    def record(place, text, fruit, *more):
        verdicts = (Verdict(criterion_id="fruit", value=fruit, judge="big"), *more)
        return judged[place].model_copy(update={"rubric": rubric, "response": text, "verdicts": verdicts})

    records = [
        record(0, "A pear", 0.5, Verdict(criterion_id="digit", value=0.0, judge="big")),  # exact: (1 + 1) / 3
        record(1, "Pear 1", 0.75),  # exact: (1.5 + 0) / 3; by the file .75, the better one
    ]
    write_judged(tmp_path / "in.jsonl", records)
    as_judged = load_judged(str(tmp_path / "in.jsonl"))
    exact, report = load_exact(str(tmp_path / "in.jsonl"))
    assert (report.verdicts, report.filled, report.corrected) == (2, 1, 1)
    batches = [
        collate(build_trees(some, encoder, responses_per_tree=8, seed=0), tail_weight=1.0)
        for some in (as_judged, exact)
    ]
    assert sorted(batches[1]["labels"].tolist()) == [0.0, 0.5, 0.75, 1.0]
    better = [batch["labels"].reshape(2, 2)[batch["pairs"][0, 0], 0].item() for batch in batches]
    assert better == [0.75, 0.5]  # the pair turned round
    tree = build_trees(exact, encoder, responses_per_tree=8, seed=0)[0]
    assert sorted(tree.rewards) == pytest.approx([0.5, 2 / 3])


def test_a_file_without_verdicts_but_with_verifiers_can_be_trained_on(judged, tmp_path):
    digit = Criterion(id="digit", text="Has no digit.", verifier=Verifier(name="no_digit"))
    records = [r.model_copy(update={"rubric": Rubric(criteria=(digit,)), "verdicts": ()}) for r in judged]
    write_judged(tmp_path / "in.jsonl", records)
    with pytest.raises(UserError, match="holds no verdicts"):
        load_judged(str(tmp_path / "in.jsonl"))
    exact, report = load_exact(str(tmp_path / "in.jsonl"))
    assert report.filled == 12 and exact[0].values() == [0.0]


def _with_counts(records, counts):
    """The records, their verdicts in turn worth ``counts`` answers; None masks one."""
    left = iter(counts)

    def recounted(verdict):
        count = next(left)
        if count is None:
            return Verdict(criterion_id=verdict.criterion_id, masked="timeout: 3 s", count=99)
        return verdict.model_copy(update={"count": count})

    return [r.model_copy(update={"verdicts": tuple(recounted(v) for v in r.verdicts)}) for r in records]


def test_counts_are_relative_to_the_mean_over_the_data_and_follow_their_verdict(judged, encoder):
    records = _with_counts(judged[:4], [1, 2, 3, 2, 1, None, 1, 4])  # seven verdicts worth 14 answers
    trees = build_trees(records, encoder, responses_per_tree=1, seed=0)
    batch = collate(trees, tail_weight=1.0)
    assert sorted(batch["counts"].tolist()) == [0.0, 0.5, 0.5, 0.5, 1.0, 1.0, 1.5, 2.0]
    assert (batch["counts"] == 0).tolist() == (batch["labels"] == -100).tolist()


def test_equal_counts_weigh_one_exactly(judged, encoder):
    drill = (Criterion(id="d1", text="Says so."), Verdict(criterion_id="d1", value=0.0, count=0.1))
    records = _with_counts(judged, [0.1] * 24)
    trees = build_trees(records, encoder, responses_per_tree=8, seed=0, drilled=[[drill]] * len(records))
    assert collate(trees, tail_weight=1.0)["counts"].tolist() == [1.0] * 36
