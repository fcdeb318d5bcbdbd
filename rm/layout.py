"""The rubric tree as one flat row of tokens: who stands where, who sees whom. Pure index arithmetic, no text, no model.

A tree is prompt -> responses -> criteria. A token attends causally to its own segment and fully to every
ancestor; siblings never see each other; positions restart at the parent's end. In depth-first order the
descendants of a segment are contiguous, which is what lets varlen flash kernels do all the attention:

    tokens    P P P P R R R c c c c R R R R c c c      two responses, two and one criteria
    segment   0 0 0 0 1 1 1 2 2 3 3 4 4 4 4 5 5 5
    depth     0 0 0 0 1 1 1 2 2 2 2 1 1 1 1 2 2 2
    position  0 1 2 3 4 5 6 7 8 7 8 4 5 6 7 8 9 10

Shape letters: T packed tokens, S segments, N (response, criterion) pairs in depth-first order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_PADDING = 0.2  # share of a batched causal call that may be padding


@dataclass(frozen=True)
class Branch:
    """One response's token ids and, for each of its criteria, that criterion's token ids."""

    tokens: list[int]
    criteria: list[list[int]]


@dataclass(frozen=True)
class Tree:
    """One prompt's token ids and its responses."""

    tokens: list[int]
    branches: list[Branch]

    @property
    def length(self) -> int:
        """Packed tokens: P + sum over responses of (R + sum of C)."""
        return len(self.tokens) + sum(len(branch.tokens) + sum(map(len, branch.criteria)) for branch in self.branches)


@dataclass(frozen=True)
class CrossBlock:
    """Queries [start, stop) attend fully to keys [key_start, key_stop): descendants over an ancestor."""

    start: int
    stop: int
    key_start: int
    key_stop: int


@dataclass(frozen=True)
class CausalGroup:
    """Segments of like length, answered by one batched causal call.

    ``index`` (s, L) token positions, each row right-padded by repeating its last token; ``valid`` (s, L)
    marks the rest. Padding is exact: under a causal mask only padding looks at padding.
    """

    index: Tensor
    valid: Tensor


@dataclass(frozen=True)
class TreeLayout:
    """Everything attention and the verdict head need to know of a packed batch of trees.

    ``segment`` (T,) segment of each token; ``parent`` (S,) parent segment or -1; ``answers`` (N,) position of
    the last token of each criterion, depth-first; ``causal`` and ``cross`` as their classes say.
    """

    segment: Tensor
    parent: Tensor
    answers: Tensor
    causal: tuple[CausalGroup, ...]
    cross: tuple[CrossBlock, ...]

    def to(self, device: torch.device | str) -> "TreeLayout":
        """The same layout with its tensors on ``device``."""
        if self.segment.device == torch.device(device):
            return self
        causal = tuple(CausalGroup(group.index.to(device), group.valid.to(device)) for group in self.causal)
        return TreeLayout(self.segment.to(device), self.parent.to(device), self.answers.to(device), causal, self.cross)

    def mask(self) -> Tensor:
        """Dense (T, T) bool: True where the row's token may look at the column's. For tests and small inputs."""
        segments = torch.arange(len(self.parent), device=self.parent.device)
        sees_SS = segments[:, None] == segments[None, :]
        ancestor = self.parent
        while (ancestor >= 0).any():
            sees_SS |= ancestor[:, None] == segments[None, :]
            ancestor = torch.where(ancestor >= 0, self.parent[ancestor.clamp(min=0)], ancestor)
        token = torch.arange(len(self.segment), device=self.segment.device)
        own = self.segment[:, None] == self.segment[None, :]
        return sees_SS[self.segment[:, None], self.segment[None, :]] & (~own | (token[:, None] >= token[None, :]))


def pack(trees: Sequence[Tree]) -> tuple[Tensor, Tensor, TreeLayout]:
    """Pack trees into one row: input ids (1, T), position ids (1, T), layout.

    Raises ValueError on an empty list, an empty segment, or a tree without criteria.
    """
    if not any(branch.criteria for tree in trees for branch in tree.branches):
        raise ValueError("pack: needs at least one tree with at least one criterion")
    ids: list[int] = []
    positions: list[int] = []
    bounds: list[tuple[int, int]] = []
    parents: list[int] = []
    answers: list[int] = []
    cross: list[CrossBlock] = []

    def add(tokens: list[int], parent: int, position: int) -> int:
        if not tokens:
            raise ValueError("pack: a segment has no tokens")
        start = len(ids)
        ids.extend(tokens)
        positions.extend(range(position, position + len(tokens)))
        bounds.append((start, len(ids)))
        parents.append(parent)
        return len(bounds) - 1

    def see(segment: int) -> None:
        """All that has been packed since ``segment`` looks at it."""
        start, stop = bounds[segment]
        if len(ids) > stop:
            cross.append(CrossBlock(stop, len(ids), start, stop))

    for tree in trees:
        root = add(tree.tokens, -1, 0)
        for branch in tree.branches:
            leaf_parent = add(branch.tokens, root, len(tree.tokens))
            for criterion in branch.criteria:
                add(criterion, leaf_parent, len(tree.tokens) + len(branch.tokens))
                answers.append(len(ids) - 1)
            see(leaf_parent)
        see(root)
    segment = torch.repeat_interleave(torch.arange(len(bounds)), torch.tensor([stop - start for start, stop in bounds]))
    layout = TreeLayout(segment, torch.tensor(parents), torch.tensor(answers), _causal_groups(bounds), tuple(cross))
    return torch.tensor([ids]), torch.tensor([positions]), layout


def _causal_groups(bounds: list[tuple[int, int]]) -> tuple[CausalGroup, ...]:
    """Group segments by length, longest first, so that no batched call wastes more than a fifth on padding."""
    ordered = sorted(bounds, key=lambda bound: bound[0] - bound[1])
    groups: list[CausalGroup] = []
    members: list[tuple[int, int]] = []
    tokens = 0
    for start, stop in [*ordered, (0, 0)]:
        width = members[0][1] - members[0][0] if members else 0
        if members and (stop == 0 or width * (len(members) + 1) * (1 - _MAX_PADDING) > tokens + stop - start):
            starts, stops = torch.tensor(members).T
            offset = torch.arange(width)
            index = torch.minimum(starts[:, None] + offset, stops[:, None] - 1)
            groups.append(CausalGroup(index, offset < (stops - starts)[:, None]))
            members, tokens = [], 0
        members.append((start, stop))
        tokens += stop - start
    return tuple(groups)
