"""Odds ratios and exact tests within strata, against numbers by hand, scipy and simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse, stats

from rubric_data.contrast import contrast, false_discovery, strata_of


def one(trait, group, stratum):
    return contrast(sparse.csr_matrix(np.array(trait, float)[:, None]), np.array(group, bool), np.array(stratum))


def test_one_stratum_is_fishers_exact_test():
    trait, group = [1] * 5 + [0] * 3 + [1] * 2 + [0] * 6, [1] * 8 + [0] * 8
    found = one(trait, group, [0] * 16)
    assert found.p_value[0] == pytest.approx(stats.fisher_exact([[5, 3], [2, 6]], alternative="greater").pvalue)
    # and half a text in each cell of one more stratum: (5 6 / 16 + 1/8) / (3 2 / 16 + 1/8)
    assert found.odds[0] == pytest.approx((30 / 16 + 1 / 8) / (6 / 16 + 1 / 8))
    assert found.low[0] < 1 < found.odds[0] < found.high[0]


def test_pairs_are_a_sign_test():
    """Of five prompts with one text of either kind, all five have the trait in the group only: ½ to the fifth."""
    found = one([1, 0] * 5, [1, 0] * 5, np.repeat(range(5), 2))
    assert found.p_value[0] == pytest.approx(1 / 32)


def test_what_only_tells_prompts_apart_tells_nothing():
    """The trait is in all texts of prompts whose texts mostly are of the group."""
    found = one([1] * 8 + [0] * 8, [1, 1, 1, 0] * 2 + [1, 0, 0, 0] * 2, np.repeat(range(4), 4))
    assert (found.p_value[0], found.odds[0]) == (1, 1)


def test_prompts_with_one_text_are_compared_with_each_other():
    assert strata_of(np.array([7, 3, 3, 5, 7, 1])).tolist() == [2, 1, 1, 0, 2, 0]
    assert strata_of(np.zeros(0, int)).tolist() == []


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), min_size=1, max_size=40))
def test_any_table_has_finite_odds_and_a_p_value(rows):
    trait, group, stratum = (np.array(column) for column in zip(*rows, strict=True))
    found = one(trait, group, np.unique(stratum, return_inverse=True)[1])
    assert 0 < found.p_value[0] <= 1 and np.isfinite([found.low[0], found.odds[0], found.high[0]]).all()
    assert found.low[0] <= found.odds[0] <= found.high[0]


def test_false_discoveries_by_benjamini_and_hochberg():
    assert false_discovery(np.array([0.01, 0.5, 0.02])).tolist() == pytest.approx([0.03, 0.5, 0.03])
    assert len(false_discovery(np.empty(0))) == 0
