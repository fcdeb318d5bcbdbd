"""Keys and values of prompts and responses that were read before, so that another rubric costs its criteria only.

Owns what is kept and for how long; attention stores into a `Reading` and reads from one. Entries are exact: they are
the very keys and values that the same text would give again.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rm.layout import Tree, TreeLayout

_Key = tuple[Hashable, ...]  # token ids of a prompt, or of a prompt and a response


@dataclass
class Reading:
    """What attention needs in one forward pass that stores (``fresh`` None) or recalls keys and values.

    ``layout`` is of the whole trees. When recalling, the input holds only the tokens at ``fresh`` (n,), and
    ``past[layer]`` is the key and value (T - n, G, D) of the others, which stand at ``known`` (T - n,). When storing,
    ``seen[layer]`` receives the key and value (T, G, D) of all.
    """

    layout: TreeLayout
    fresh: Tensor | None = None
    known: Tensor | None = None
    past: Sequence[tuple[Tensor, Tensor]] = ()
    seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def whole(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of all tokens of the layout; the queries of known ones are zero."""
        if self.fresh is None or self.known is None:
            self.seen[layer] = (key, value)
            return query, key, value
        total = len(self.fresh) + len(self.known)
        past_key, past_value = self.past[layer]
        rows = []
        for new, old in ((query, None), (key, past_key), (value, past_value)):
            row = new.new_zeros(total, *new.shape[1:])
            row[self.fresh] = new
            if old is not None:
                row[self.known] = old
            rows.append(row)
        return rows[0], rows[1], rows[2]

    def to(self, device: torch.device | str) -> "Reading":
        """The same reading with its tensors on ``device``."""
        if self.fresh is None or self.known is None:
            return Reading(self.layout.to(device))
        past = [(key.to(device), value.to(device)) for key, value in self.past]
        return Reading(self.layout.to(device), self.fresh.to(device), self.known.to(device), past)

    def wanted(self, out: Tensor) -> Tensor:
        """The rows of ``out`` (T, H, D) that are in the input."""
        return out if self.fresh is None else out[self.fresh]


class PrefixCache:
    """The least recently used leave first; holds at most ``capacity`` tokens."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens = 0
        self.hits = self.misses = 0  # responses found, and not found
        self._entries: OrderedDict[_Key, Tensor] = OrderedDict()  # (layers, 2, tokens, G, D)

    def knows(self, tree: Tree) -> bool:
        """Whether the prompt and every response of ``tree`` are here; counts hits and misses."""
        prompt = tuple(tree.tokens)
        found = prompt in self._entries and all(_response(prompt, b.tokens) in self._entries for b in tree.branches)
        self.hits += found * len(tree.branches)
        self.misses += (not found) * len(tree.branches)
        return found

    def store(self, trees: Sequence[Tree], reading: Reading) -> None:
        """Keep what ``reading`` has seen of the trees' prompts and responses."""
        for key, start, length in _prefixes(trees):
            if key in self._entries:
                self._entries.move_to_end(key)
            elif length <= self.capacity:
                rows = slice(start, start + length)
                layers = [torch.stack([x[rows] for x in reading.seen[layer]]) for layer in sorted(reading.seen)]
                self._keep(key, torch.stack(layers))

    def recall(self, trees: Sequence[Tree], layout: TreeLayout) -> Reading:
        """A reading that has the prompts and responses of ``trees``, all of which must be known."""
        parts, known = [], []
        for key, start, length in _prefixes(trees):
            self._entries.move_to_end(key)
            parts.append(self._entries[key])
            known.append(torch.arange(start, start + length))
        past = torch.cat(parts, 2)
        known_rows = torch.cat(known)
        is_fresh = torch.ones(int(layout.length.sum()), dtype=torch.bool)
        is_fresh[known_rows] = False
        fresh = torch.nonzero(is_fresh).flatten()
        asks = torch.tensor([not prefix for tree in trees for prefix in _segments(tree)])
        layout = replace(layout, asks=asks)
        return Reading(layout, fresh, known_rows, [(layer[0], layer[1]) for layer in past])

    def _keep(self, key: _Key, value: Tensor) -> None:
        size = value.shape[2]
        while self.tokens + size > self.capacity:
            _, oldest = self._entries.popitem(last=False)
            self.tokens -= oldest.shape[2]
        self._entries[key] = value
        self.tokens += size


def _response(prompt: tuple[int, ...], tokens: Sequence[int]) -> _Key:
    return (prompt, tuple(tokens))


def _segments(tree: Tree) -> Iterator[bool]:
    """Of each segment of a tree, depth-first, whether it is a prompt or a response."""
    yield True
    for branch in tree.branches:
        yield True
        yield from [False] * len(branch.criteria)


def _prefixes(trees: Sequence[Tree]) -> list[tuple[_Key, int, int]]:
    """Key, first row and length of every prompt and response, in the order of the packed row."""
    found: list[tuple[_Key, int, int]] = []
    row = 0
    for tree in trees:
        prompt = tuple(tree.tokens)
        found.append((prompt, row, len(prompt)))
        row += len(prompt)
        for branch in tree.branches:
            found.append((_response(prompt, branch.tokens), row, len(branch.tokens)))
            row += len(branch.tokens) + sum(map(len, branch.criteria))
    return found
