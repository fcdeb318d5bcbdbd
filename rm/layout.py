"""The rubric tree as one flat row of tokens: who stands where, who sees whom. Pure index arithmetic, no text, no model.

A tree is prompt -> responses -> criteria. A token attends causally to its own segment and fully to every
ancestor; siblings never see each other; positions restart at the parent's end:

    tokens    P P P P R R R c c c c R R R R c c c      two responses, two and one criteria
    segment   0 0 0 0 1 1 1 2 2 3 3 4 4 4 4 5 5 5
    depth     0 0 0 0 1 1 1 2 2 2 2 1 1 1 1 2 2 2
    position  0 1 2 3 4 5 6 7 8 7 8 4 5 6 7 8 9 10

Three views of the same tree, each built when first asked for:

- `TreeLayout.families`, for kernels that walk the tree: segments with the same parent, which share the keys of the
  path that leads to them.
- `TreeLayout.groups`, for kernels that know only batches: the row is cut into blocks. A block holds queries and all
  the keys these may see: a prompt over itself; a response and some of its criteria over the prompt, the response and
  those criteria. Every token is a query of one block, so a block's attention is complete, and no block is wider than
  its longest path and `_MAX_QUERIES`.

- `TreeLayout.varlen_calls`, for kernels that read ragged sequences: one causal call over all segments, and one call
  for each depth, in which the descendants of a segment read it.

Shape letters: T packed tokens, S segments, N (response, criterion) pairs in depth-first order; F families, n blocks
of a group, Q queries, K keys.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_MAX_QUERIES = 256  # of a block, unless one criterion is longer: what a block computes in vain grows with it
_FAMILY_TOKENS = 512  # of a family, unless one segment is longer: families are what threads share out
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


class Families(NamedTuple):
    """Segments by parent, int32: family f is ``members[first[f] : first[f + 1]]`` below segment ``parent[f]``, or -1.

    ``parent`` (F,), ``first`` (F + 1,), ``members`` (S,), ``tree_first`` (trees + 1,): the families of one tree are
    consecutive. Many siblings make several families.
    """

    parent: Tensor
    first: Tensor
    members: Tensor
    tree_first: Tensor


class VarlenCall(NamedTuple):
    """One call of a variable-length kernel: sequence i has queries ``query_first[i] : query_first[i + 1]``, keys alike.

    ``queries`` and ``keys``: token positions of the call's rows, None where they are all tokens in order;
    ``query_first``, ``key_first`` (sequences + 1,) int32; a causal call has the same queries and keys.
    """

    queries: Tensor | None
    keys: Tensor | None
    query_first: Tensor
    key_first: Tensor
    longest_query: int
    longest_key: int
    causal: bool

    def to(self, device: torch.device) -> "VarlenCall":
        """The same call with its tensors on ``device``."""
        return self._replace(
            queries=None if self.queries is None else self.queries.to(device),
            keys=None if self.keys is None else self.keys.to(device),
            query_first=self.query_first.to(device),
            key_first=self.key_first.to(device),
        )


@dataclass(frozen=True)
class TreeLayout:
    """Everything attention and the verdict head need to know of a packed batch of trees.

    ``start``, ``length``, ``parent`` (S,) int32 of each segment, depth-first, parent -1 at a root; ``answers`` (N,)
    position of the last token of each criterion; ``asks`` (S,) bool: whose attention is wanted, None for all. What
    attention gives at the others is undefined.
    """

    start: Tensor
    length: Tensor
    parent: Tensor
    answers: Tensor
    asks: Tensor | None = None

    def to(self, device: torch.device | str) -> "TreeLayout":
        """The same layout with its tensors on ``device``."""
        if self.answers.device == torch.device(device):
            return self
        asks = None if self.asks is None else self.asks.to(device)
        start, length, parent, answers = (x.to(device) for x in (self.start, self.length, self.parent, self.answers))
        return TreeLayout(start, length, parent, answers, asks)

    @functools.cached_property
    def segment(self) -> Tensor:
        """Segment of each token (T,) int64."""
        return torch.repeat_interleave(torch.arange(len(self.length), device=self.length.device), self.length)

    @functools.cached_property
    def longest_path(self) -> int:
        """Tokens from a root to the end of the deepest leaf."""
        reach: list[int] = []
        for length, parent in zip(self.length.tolist(), self.parent.tolist(), strict=True):
            reach.append(length + (reach[parent] if parent >= 0 else 0))
        return max(reach)

    @functools.cached_property
    def families(self) -> Families:
        """The segments by parent, for kernels that walk the tree; only those that ask."""
        asks = [True] * len(self.parent) if self.asks is None else self.asks.tolist()
        return _families(self.parent.tolist(), self.length.tolist(), asks)

    @functools.cached_property
    def groups(self) -> tuple[AttentionGroup, ...]:
        """Blocks of like size, for kernels that know only batches; they cover every token as a query once."""
        blocks = _blocks(self.start.tolist(), self.length.tolist(), self.parent.tolist())
        return tuple(_group(members, self.segment, self.parent.long()) for members in _alike(blocks))

    @functools.cached_property
    def varlen_calls(self) -> tuple[VarlenCall, ...]:
        """Calls that together make up tree attention (see `rm.varlen`); the first one is causal over all segments."""
        calls = _varlen_calls(self.start.tolist(), self.length.tolist(), self.parent.tolist())
        return tuple(call.to(self.start.device) for call in calls)

    def mask(self) -> Tensor:
        """Dense (T, T) bool: True where the row's token may look at the column's. For tests and small inputs."""
        segments = torch.arange(len(self.parent), device=self.parent.device)
        sees_SS = segments[:, None] == segments[None, :]
        parent = ancestor = self.parent.long()
        while (ancestor >= 0).any():
            sees_SS |= ancestor[:, None] == segments[None, :]
            ancestor = torch.where(ancestor >= 0, parent[ancestor.clamp(min=0)], ancestor)
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

    def add(tokens: list[int], parent: int, position: int) -> int:
        if not tokens:
            raise ValueError("pack: a segment has no tokens")
        ids.extend(tokens)
        positions.extend(range(position, position + len(tokens)))
        parents.append(parent)
        lengths.append(len(tokens))
        return len(parents) - 1

    for tree in trees:
        root, below_prompt = add(tree.tokens, -1, 0), len(tree.tokens)
        for branch in tree.branches:
            response, below_response = add(branch.tokens, root, below_prompt), below_prompt + len(branch.tokens)
            for tokens in branch.criteria:
                add(tokens, response, below_response)
                answers.append(len(ids) - 1)
    length = torch.tensor(lengths, dtype=torch.int32)
    start = length.cumsum(0, dtype=torch.int32) - length
    layout = TreeLayout(start, length, torch.tensor(parents, dtype=torch.int32), torch.tensor(answers))
    return torch.tensor([ids]), torch.tensor([positions]), layout


def _families(parents: Sequence[int], lengths: Sequence[int], asks: Sequence[bool]) -> Families:
    children: dict[int, list[int]] = {}
    roots = []
    for segment, parent in enumerate(parents):
        if parent < 0:
            roots.append(segment)
        elif asks[segment]:
            children.setdefault(parent, []).append(segment)
    above, first, members, tree_first = [], [0], [], [0]

    def add(parent: int, family: list[int]) -> None:
        above.append(parent)
        members.extend(family)
        first.append(len(members))

    for place, root in enumerate(roots):
        if asks[root]:
            add(-1, [root])
        end = roots[place + 1] if place + 1 < len(roots) else len(parents)
        for parent in range(root, end):  # a tree's segments are consecutive
            family: list[int] = []
            tokens = 0
            for segment in children.get(parent, ()):
                if family and tokens + lengths[segment] > _FAMILY_TOKENS:
                    add(parent, family)
                    family, tokens = [], 0
                family.append(segment)
                tokens += lengths[segment]
            if family:
                add(parent, family)
        tree_first.append(len(above))
    return Families(*(torch.tensor(x, dtype=torch.int32) for x in (above, first, members, tree_first)))


def _varlen_calls(starts: Sequence[int], lengths: Sequence[int], parents: Sequence[int]) -> Iterator[VarlenCall]:
    first = torch.tensor([*starts, starts[-1] + lengths[-1]], dtype=torch.int32)
    yield VarlenCall(None, None, first, first, max(lengths), max(lengths), True)
    depths: list[int] = []
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]  # of all that descends from it
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    for segment in reversed(range(len(parents))):
        if parents[segment] >= 0:
            ends[parents[segment]] = max(ends[parents[segment]], ends[segment])
    for depth in range(max(depths)):
        read = [s for s in range(len(parents)) if depths[s] == depth and ends[s] > starts[s] + lengths[s]]
        below = [range(starts[s] + lengths[s], ends[s]) for s in read]  # depth-first: descendants are consecutive
        own = [range(starts[s], starts[s] + lengths[s]) for s in read]
        queries, query_first = _runs(below)
        keys, key_first = _runs(own)
        yield VarlenCall(queries, keys, query_first, key_first, max(map(len, below)), max(map(len, own)), False)


def _runs(runs: Sequence[range]) -> tuple[Tensor, Tensor]:
    """Positions of consecutive runs, and where each begins among them (runs + 1,) int32."""
    first = torch.tensor([0, *map(len, runs)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return torch.cat([torch.arange(run.start, run.stop) for run in runs]), first


@dataclass(frozen=True)
class _Block:
    """Runs of token positions: those that ask, and all they may look at."""

    queries: list[range]
    keys: list[range]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(map(len, self.queries)), sum(map(len, self.keys))


def _blocks(starts: Sequence[int], lengths: Sequence[int], parents: Sequence[int]) -> list[_Block]:
    runs = [range(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    paths: list[list[range]] = []  # of each segment, itself included
    inner = {parent for parent in parents if parent >= 0}
    open_blocks: dict[int, _Block] = {}  # by inner segment: the block its next leaf joins
    blocks: list[_Block] = []
    for segment, parent in enumerate(parents):
        run = runs[segment]
        paths.append([*(paths[parent] if parent >= 0 else []), run])
        if segment in inner or parent < 0:
            open_blocks[segment] = _Block([run], list(paths[segment]))
            blocks.append(open_blocks[segment])
            continue
        block = open_blocks[parent]
        if sum(map(len, block.queries)) + len(run) > _MAX_QUERIES:
            block = open_blocks[parent] = _Block([], list(paths[parent]))
            blocks.append(block)
        block.queries.append(run)
        block.keys.append(run)
    return blocks


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
