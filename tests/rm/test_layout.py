import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rm.layout import Branch, Tree, pack
from tests.rm.trees import forests, paths

# two responses to one prompt; the first has two criteria, the second one (the picture in rm.layout)
TREE = Tree([1, 1, 1, 1], [Branch([2, 2, 2], [[3, 3], [4, 4]]), Branch([5, 5, 5, 5], [[6, 6, 6]])])


def test_pack_lays_the_documented_example_out():
    input_ids, position_ids, layout = pack([TREE])
    assert input_ids.tolist() == [[1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5, 5, 5, 6, 6, 6]]
    assert position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 8, 4, 5, 6, 7, 8, 9, 10]]
    assert layout.segment.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4, 5, 5, 5]
    assert layout.parent.tolist() == [-1, 0, 1, 1, 0, 4]
    assert layout.answers.tolist() == [8, 10, 17]
    blocks = [  # the two branches and the prompt; those of like size share a group
        (queries[valid].tolist(), keys.unique().tolist())
        for group in layout.groups
        for queries, keys, valid in zip(group.queries, group.keys, group.valid, strict=True)
    ]
    assert blocks == [
        ([4, 5, 6, 7, 8, 9, 10], [0, 1, 2, 3, *range(4, 11)]),
        ([11, 12, 13, 14, 15, 16, 17], [0, 1, 2, 3, *range(11, 18)]),
        ([0, 1, 2, 3], [0, 1, 2, 3]),
    ]


def test_mask_shows_ancestors_and_never_siblings():
    mask = pack([TREE])[2].mask()
    criterion_sees = torch.nonzero(mask[10]).flatten().tolist()  # last token of the second criterion
    assert criterion_sees == [0, 1, 2, 3, 4, 5, 6, 9, 10]
    assert torch.nonzero(mask[11]).flatten().tolist() == [0, 1, 2, 3, 11]  # first token of the second response


@given(forests)
def test_mask_rows_spell_out_the_path_to_the_token(forest):
    input_ids, position_ids, layout = pack(forest)
    mask = layout.mask()
    for answer, path in zip(layout.answers.tolist(), paths(forest), strict=True):
        seen = torch.nonzero(mask[answer]).flatten()
        assert input_ids[0, seen].tolist() == path
        assert position_ids[0, seen].tolist() == list(range(len(path)))


@given(forests, st.sampled_from([1, 8, 256]))
def test_blocks_ask_every_token_once_and_show_what_the_dense_mask_shows(forest, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rm.layout._MAX_QUERIES", most)
        layout = pack(forest)[2]
    mask = layout.mask()
    asked = torch.cat([group.queries[group.valid] for group in layout.groups])
    assert sorted(asked.tolist()) == list(range(len(layout.segment)))
    for group in layout.groups:
        for queries, keys, bias in zip(group.queries, group.keys, group.bias[:, 0], strict=True):
            for query, row in zip(queries.tolist(), bias, strict=True):
                assert sorted(keys[row == 0].tolist()) == torch.nonzero(mask[query]).flatten().tolist()


@pytest.mark.parametrize(
    "forest", [[], [Tree([1], [])], [Tree([1], [Branch([2], [])])], [Tree([], [Branch([2], [[3]])])]]
)
def test_pack_refuses_what_has_no_answer_or_no_tokens(forest):
    with pytest.raises(ValueError, match=r"pack: "):
        pack(forest)
