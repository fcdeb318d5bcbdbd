"""Random rubric trees for property tests."""

from hypothesis import strategies as st

from rm.layout import Branch, Tree

VOCABULARY = 300
_tokens = st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=12)
_branches = st.builds(Branch, _tokens, st.lists(_tokens, min_size=1, max_size=4))
trees = st.builds(Tree, _tokens, st.lists(_branches, min_size=1, max_size=4))
forests = st.lists(trees, min_size=1, max_size=3)


def paths(forest: list[Tree]) -> list[list[int]]:
    """Every prompt + response + criterion of the forest as one plain sequence, depth-first."""
    return [
        tree.tokens + branch.tokens + criterion
        for tree in forest
        for branch in tree.branches
        for criterion in branch.criteria
    ]
