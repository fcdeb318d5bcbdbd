import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rm.metrics import tail_size
from rm.mining import mine
from rubric_data.records import Criterion, JudgedResponse, Rubric, Verdict

RUBRIC = Rubric(criteria=(Criterion(id="good", text="Is good."),))


def answered(prompt, reward, text, generator="small"):
    """A response to ``prompt`` whose reward is the one verdict on it; None masks it."""
    verdict = Verdict(criterion_id="good", value=reward, masked=None if reward is not None else "timeout: 3 s")
    return JudgedResponse(
        prompt_id=prompt,
        prompt=prompt,
        response_id=f"{prompt}-{text}",
        response=text,
        rubric=RUBRIC,
        generator=generator,
        verdicts=(verdict,),
    )


def named(records, mined):
    """The pairs as (better, worse) texts."""
    first, second = mined.pairs.first_M, mined.pairs.second_M
    return {(records[a].response, records[b].response) for a, b in zip(first, second, strict=True)}


def test_mined_pairs_by_hand():
    records = [
        answered("p", 0.2, "poor"),
        answered("q", 1.0, "other prompt", "big"),  # q has but one rewarded response
        answered("p", 0.9, "excellent", "big"),
        answered("p", 0.7, "great"),
        answered("p", None, "unanswered"),
        answered("p", 0.7, "as great"),  # ties with the last of the top half of five, so the tail has three
        answered("q", None, "unanswered"),
        *(answered("r", 1.0, text) for text in ("all", "the", "same")),
        answered("s", 0.5, "copy"),
        answered("s", 0.6, "copy", "big").model_copy(update={"response_id": "s-copy-2"}),  # no text can tell
        answered("t", 0.55, "near"),
        answered("t", 0.5, "nearly"),
    ]
    mined = mine(records, tail=0.5, min_margin=0.1)
    assert named(records, mined) == {("excellent", "great"), ("excellent", "as great")}
    assert (mined.prompts, mined.with_pairs, mined.alone, mined.tied, mined.too_close) == (5, 1, 1, 1, 2)
    assert (mined.across, mined.mean_margin) == (2, pytest.approx(0.2))
    assert mined.responses == {2, 3, 5}
    closer = mine(records, tail=0.5, min_margin=0.05)
    assert named(records, closer) - named(records, mined) == {("near", "nearly")}
    nothing = mine(records[7:10], tail=0.5)
    assert (len(nothing.pairs.first_M), nothing.tied, nothing.responses) == (0, 1, set())
    assert math.isnan(nothing.mean_margin)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("pqr"), st.sampled_from([None, 0.0, 0.25, 0.5, 0.75, 1.0])), min_size=1, max_size=24
    ),
    st.sampled_from([0.1, 0.25, 0.5, 1.0]),
    st.randoms(use_true_random=False),
)
def test_every_pair_is_ordered_in_the_tail_of_one_prompt_whatever_the_order_of_responses(given_rows, tail, random):
    records = [answered(prompt, reward, f"response {place}") for place, (prompt, reward) in enumerate(given_rows)]
    mined = mine(records, tail=tail)
    for better, worse in zip(mined.pairs.first_M, mined.pairs.second_M, strict=True):
        above, below = records[better], records[worse]
        assert above.prompt == below.prompt
        rewards = [r.values()[0] for r in records if r.prompt == above.prompt and r.values()[0] is not None]
        rewards = sorted((reward for reward in rewards if not math.isnan(reward)), reverse=True)
        assert above.values()[0] > below.values()[0] >= rewards[tail_size(len(rewards), tail) - 1]
    assert mined.with_pairs + mined.alone + mined.tied + mined.too_close == mined.prompts
    shuffled = list(records)
    random.shuffle(shuffled)
    assert named(shuffled, mine(shuffled, tail=tail)) == named(records, mined)
