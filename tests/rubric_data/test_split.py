from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rubric_data.errors import LeakError, UserError
from rubric_data.records import Criterion, JudgedResponse, Rubric
from rubric_data.split import assign_splits, check_leaks, of_split, prompt_groups


def response(prompt_id, *, prompt=None, rubric=None, number=0, split=None):
    criterion = Criterion(id="c", text=rubric or f"rubric of {prompt_id}")
    return JudgedResponse(
        prompt_id=prompt_id,
        prompt=prompt or f"prompt {prompt_id}",
        response_id=f"{prompt_id}::{number}",
        response="",
        rubric=Rubric(criteria=(criterion,)),
        split=split,
    )


def splits(records):
    return {record.prompt_id: record.split for record in records}


def test_groups_are_chains_of_equal_texts_and_rubrics():
    records = [
        response("a", prompt="Write a Poem"),
        response("b", prompt="write  a poem\n"),
        response("c", rubric="rubric of b"),
        response("d"),
        response("d", number=1, rubric="second rubric"),
        response("e", rubric="second rubric"),
        response("f"),
    ]
    assert prompt_groups(records) == [["a", "b", "c"], ["d", "e"], ["f"]]
    assert prompt_groups(records, shared_rubrics=True) == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]


def test_fractions_hold_exactly_for_equal_groups():
    records = [response(f"p{number}", number=copy) for number in range(20) for copy in range(3)]
    given_splits = splits(assign_splits(records))
    assert Counter(given_splits.values()) == {"train": 14, "validation": 2, "test": 4}


def test_a_huge_group_goes_to_the_largest_split():
    huge = [response(f"h{number}", rubric="one checklist") for number in range(12)]
    single = [response(f"s{number}") for number in range(8)]
    for seed in range(20):
        found = splits(assign_splits(huge + single, seed=seed))
        assert {found[f"h{number}"] for number in range(12)} == {"train"}
        assert Counter(found.values()) == {"train": 14, "validation": 2, "test": 4}


def test_every_split_gets_a_group_when_there_are_just_enough():
    records = [response("a"), response("b"), response("c")]
    assert set(splits(assign_splits(records)).values()) == {"train", "validation", "test"}
    huge = [response(f"h{number}", rubric="one checklist") for number in range(9)]
    found = splits(assign_splits([*huge, response("a"), response("b")]))
    assert found["h0"] == "train" and {found["a"], found["b"]} == {"validation", "test"}


def test_no_split_takes_the_last_group_of_another():
    huge = [response(f"h{number}", rubric="one checklist") for number in range(4)]
    for seed in range(20):
        found = assign_splits([*huge, response("a"), response("b")], fractions=(1 / 3, 1 / 3, 1 / 3), seed=seed)
        assert len(set(splits(found).values())) == 3


@settings(max_examples=80, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)), min_size=1, max_size=60),
    seed=st.integers(0, 3),
    data=st.data(),
)
def test_splits_never_leak_and_do_not_depend_on_order(pairs, seed, data):
    records = [
        response(f"p{prompt}", rubric=f"rubric {rubric}", number=number)
        for number, (prompt, rubric) in enumerate(pairs)
    ]
    groups = len(prompt_groups(records))
    if groups < 3:
        with pytest.raises(UserError, match=f"{groups} group"):
            assign_splits(records, seed=seed)
        return
    assigned = assign_splits(records, seed=seed)
    check_leaks(assigned)
    assert set(splits(assigned).values()) == {"train", "validation", "test"}
    assert [record.model_copy(update={"split": None}) for record in assigned] == records
    shuffled = data.draw(st.permutations(records))
    assert splits(assign_splits(shuffled, seed=seed)) == splits(assigned)


def test_seed_changes_the_cut_and_is_pinned():
    records = [response(f"p{number}") for number in range(10)]
    first = splits(assign_splits(records))
    assert first != splits(assign_splits(records, seed=1))
    # golden: a cut must not move when the code does
    held_out = {name: split for name, split in first.items() if split != "train"}
    assert held_out == {"p0": "test", "p1": "test", "p9": "validation"}


def test_given_splits_stay_but_only_if_all_are_given():
    records = [response("a", split="test"), response("b", split="test")]
    assert assign_splits(records) == records
    with pytest.raises(UserError, match="1 of 2 records carry a split"):
        assign_splits([records[0], response("b")])


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.7, 0.1, 0.1), (1.2, -0.1, -0.1), (float("nan"), 0.5, 0.5)])
def test_fractions_must_be_shares(fractions):
    with pytest.raises(UserError, match="add up to 1"):
        assign_splits([response("a")], fractions=fractions)


def test_a_split_may_be_left_out():
    found = splits(assign_splits([response(f"p{number}") for number in range(10)], fractions=(0.8, 0, 0.2)))
    assert Counter(found.values()) == {"train": 8, "test": 2}


@pytest.mark.parametrize(
    ("second", "named"),
    [
        (
            response("a", number=1, rubric="other", prompt="other", split="test"),
            "prompt 'a' stands in train and in test",
        ),
        (
            response("b", prompt=" PROMPT a", split="test"),
            "the text of prompt 'a' (again as 'b') stands in train and in",
        ),
        (response("b", rubric="rubric of a", split="test"), "(of prompts 'a' and 'b') stands in train and in test"),
    ],
)
def test_a_leak_is_named(second, named):
    with pytest.raises(LeakError) as caught:
        check_leaks([response("z", split="test"), response("a", split="train"), second])
    assert named in str(caught.value)


def test_shared_rubrics_may_stand_in_several_splits_but_prompts_may_not():
    checklist = [response(name, rubric="one", split=split) for name, split in (("a", "train"), ("b", "test"))]
    check_leaks(checklist, shared_rubrics=True)
    with pytest.raises(LeakError, match="prompt 'a'"):
        check_leaks([*checklist, response("a", number=1, split="test")], shared_rubrics=True)


def test_of_split_says_what_is_there_instead():
    records = [response("a", split="train"), response("b", split="train"), response("c")]
    assert of_split(records, "train") == records[:2]
    with pytest.raises(UserError, match=r"split 'test' \(found: no split 1, train 2\)"):
        of_split(records, "test")
