"""The rubric tree as one flat row of tokens: who stands where, who sees whom. Pure index arithmetic, no text, no model.

A tree is prompt -> responses -> criteria. A token attends causally to its own segment and fully to every
ancestor; siblings never see each other; positions restart at the parent's end:

    tokens    P P P P R R R c c c c R R R R c c c      two responses, two and one criteria
    segment   0 0 0 0 1 1 1 2 2 3 3 4 4 4 4 5 5 5
    depth     0 0 0 0 1 1 1 2 2 2 2 1 1 1 1 2 2 2
    position  0 1 2 3 4 5 6 7 8 7 8 4 5 6 7 8 9 10

For attention the row is cut into blocks. A block holds queries and all the keys these may see: a prompt over
itself; a response and some of its criteria over the prompt, the response and those criteria. Every token is a query
of one block, so a block's attention is complete, and no block is wider than its longest path and `_MAX_QUERIES`.

Shape letters: T packed tokens, S segments, N (response, criterion) pairs in depth-first order; n blocks of a group,
Q queries, K keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_QUERIES = 256  # of a block, unless one criterion is longer: what a block computes in vain grows with it
_MAX_PADDING = 0.3  # share of a group's query-key pairs that may be padding


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
class AttentionGroup:
    """Blocks of like size, answered by one batched call.

    ``queries`` (n, Q) and ``keys`` (n, K) token positions, rows right-padded by repeating their last;
    ``valid`` (n, Q) marks queries that are no padding; ``bias`` (n, 1, Q, K) float32, 0 where the query sees the
    key and -inf elsewhere. A padded query sees what the query it repeats sees.
    """

    queries: Tensor
    keys: Tensor
    valid: Tensor
    bias: Tensor

    def to(self, device: torch.device | str) -> "AttentionGroup":
        """The same group on ``device``."""
        return AttentionGroup(*(x.to(device) for x in (self.queries, self.keys, self.valid, self.bias)))


@dataclass(frozen=True)
class TreeLayout:
    """Everything attention and the verdict head need to know of a packed batch of trees.

    ``segment`` (T,) segment of each token; ``parent`` (S,) parent segment or -1; ``answers`` (N,) position of
    the last token of each criterion, depth-first; ``groups`` cover every token as a query once.
    """

    segment: Tensor
    parent: Tensor
    answers: Tensor
    groups: tuple[AttentionGroup, ...]

    def to(self, device: torch.device | str) -> "TreeLayout":
        """The same layout with its tensors on ``device``."""
        if self.segment.device == torch.device(device):
            return self
        groups = tuple(group.to(device) for group in self.groups)
        return TreeLayout(self.segment.to(device), self.parent.to(device), self.answers.to(device), groups)

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
    parents: list[int] = []
    lengths: list[int] = []
    answers: list[int] = []
    blocks: list[_Block] = []

    def add(tokens: list[int], parent: int, position: int) -> range:
        if not tokens:
            raise ValueError("pack: a segment has no tokens")
        ids.extend(tokens)
        positions.extend(range(position, position + len(tokens)))
        parents.append(parent)
        lengths.append(len(tokens))
        return range(len(ids) - len(tokens), len(ids))

    for tree in trees:
        root, prompt = len(parents), add(tree.tokens, -1, 0)
        blocks.append(_Block([prompt], [prompt]))
        for branch in tree.branches:
            parent, response = len(parents), add(branch.tokens, root, len(prompt))
            block = _Block([response], [prompt, response])
            for tokens in branch.criteria:
                criterion = add(tokens, parent, len(prompt) + len(response))
                answers.append(criterion[-1])
                if sum(map(len, block.queries)) + len(criterion) > _MAX_QUERIES:
                    blocks.append(block)
                    block = _Block([], [prompt, response])
                block.queries.append(criterion)
                block.keys.append(criterion)
            blocks.append(block)
    segment = torch.repeat_interleave(torch.arange(len(parents)), torch.tensor(lengths))
    parent_S = torch.tensor(parents)
    groups = tuple(_group(members, segment, parent_S) for members in _alike(blocks))
    return torch.tensor([ids]), torch.tensor([positions]), TreeLayout(segment, parent_S, torch.tensor(answers), groups)


@dataclass(frozen=True)
class _Block:
    """Runs of token positions: those that ask, and all they may look at."""

    queries: list[range]
    keys: list[range]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(map(len, self.queries)), sum(map(len, self.keys))


def _alike(blocks: list[_Block]) -> Iterator[list[_Block]]:
    """Blocks by size, largest first, cut where padding to a common shape would waste more than `_MAX_PADDING`."""
    members: list[_Block] = []
    pairs = width = height = 0
    for block in sorted(blocks, key=lambda block: block.shape, reverse=True):
        queries, keys = block.shape
        wider, higher = max(width, keys), max(height, queries)
        if members and wider * higher * (len(members) + 1) * (1 - _MAX_PADDING) > pairs + queries * keys:
            yield members
            members, pairs, wider, higher = [], 0, keys, queries
        members.append(block)
        pairs, width, height = pairs + queries * keys, wider, higher
    yield members


def _group(blocks: list[_Block], segment: Tensor, parent: Tensor) -> AttentionGroup:
    queries, valid = _padded([block.queries for block in blocks])
    keys, real = _padded([block.keys for block in blocks])
    asking, seen = segment[queries][:, :, None], segment[keys][:, None, :]
    own = (asking == seen) & (queries[:, :, None] >= keys[:, None, :])
    above = parent[asking]
    # an index of -1 finds the last segment, a criterion, which is nobody's ancestor
    sees = (own | (above == seen) | (parent[above] == seen)) & real[:, None, :]
    bias = torch.zeros(sees.shape).masked_fill_(~sees, -torch.inf)
    return AttentionGroup(queries, keys, valid, bias[:, None])


def _padded(rows: list[list[range]]) -> tuple[Tensor, Tensor]:
    """Token positions (n, longest row) padded by repeating the last, and which of them are no padding."""
    flat = [torch.cat([torch.arange(run.start, run.stop) for run in row]) for row in rows]
    longest = max(map(len, flat))
    index = torch.stack([torch.cat([row, row[-1:].expand(longest - len(row))]) for row in flat])
    return index, torch.arange(longest) < torch.tensor([len(row) for row in flat])[:, None]
