"""Context parallelism: which rank holds each token of a micro-batch, and which keys ranks send one another.

C context ranks share the tokens of every row. A FULL token of another rank is to a rank what a KV_ONLY token is: it
asks nothing, and its key and value are there (they arrive by message). So a rank's queries see what they would see in
one process, bottom-right aligned, and no kernel changes.

**Placement.** Every rank holds an equal share of every *group* of tokens (its quota, rounded up), so that ranks have
equal work in every layer whatever the plan. What remains to balance is attention and the output head. A long document
is cut in each group into 2 C blocks, and rank r takes blocks r and 2 C - 1 - r, one that sees few keys and one that
sees many. Short documents stay whole, largest first, each with the rank that has least to do and room for it; one is
cut only where none has room, so at most (C - 1) documents for each group.

**Keys.** A rank needs the keys that its queries see and another rank holds: none of a document that it holds whole.
Every rank derives all ranks' needs, so all know the sizes of all messages.

Prior art: per-document sharding (WLB-LLM, arXiv 2503.17924); whole documents and only the keys needed (FlashCP, arXiv
2606.08476); gathering all keys (Llama 3, arXiv 2407.21783, 3.3.2). All is integers, the same on every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_ext.routing.roles import Role
from megatron_ext.routing.visible_keys import visible_keys


@dataclass
class Exchange:
    """The messages of one layer, as one rank sees them. Rows are of [FULL rows, KV_ONLY rows], gathered over the ranks
    of sequence parallelism; those that go to one rank have the FULL ones first.

    Attributes:
        sent, received: rows to and from each context rank.
        sent_full: how many of the sent rows are FULL.
        full, kv_only: the FULL rows and the KV_ONLY rows that are sent, int32, for one rank after the other.
    """

    sent: list[int]
    sent_full: list[int]
    received: list[int]
    full: np.ndarray
    kv_only: np.ndarray


@dataclass
class Placement:
    """The context rank of each of t tokens.

    Attributes:
        owner: [t], the rank that holds each token; -1 for padding.
        size: number of ranks, C.
        group, document: [t], as :class:`~megatron_ext.routing.layer_route.StoredRows` has them.
    """

    owner: np.ndarray
    size: int
    group: np.ndarray
    document: np.ndarray
    _needs: dict = field(default_factory=dict, repr=False)

    def needs(self, roles: Sequence[Role]) -> np.ndarray | None:
        """[C, t], whether each rank must be sent each token's key where groups have ``roles``; None: nothing at all is
        sent."""
        roles = tuple(roles)
        if roles not in self._needs:
            role = np.array([*roles, Role.SKIP])[self.group]
            full = np.flatnonzero(role == Role.FULL)
            last = np.full((self.size, self.document.max(initial=0) + 1), -1)
            last[self.owner[full], self.document[full]] = full  # the last query of each document on each rank
            token = np.arange(role.size)
            others = self.owner != np.arange(self.size)[:, None]
            needed = (role != Role.SKIP) & others & (token <= last[:, self.document])
            self._needs[roles] = needed if needed.any() else None
        return self._needs[roles]

    def received(self, roles: Sequence[Role], rank: int) -> np.ndarray | None:
        """The tokens whose keys a rank receives, in the order in which they arrive; None: nothing is sent at all."""
        needs = self.needs(roles)
        if needs is None:
            return None
        return np.concatenate([self._message(roles, needs[rank], source)[0] for source in range(self.size)])

    def exchange(self, roles: Sequence[Role], rank: int, full_row: np.ndarray, kv_only_row: np.ndarray) -> Exchange:
        """The messages of a rank.

        Args:
            full_row, kv_only_row: [t], row of each of the rank's tokens among its gathered FULL and KV_ONLY rows.
        """
        needs = self.needs(roles)
        messages = [self._message(roles, needs[other], rank) for other in range(self.size)]
        tokens = [(message[:full], message[full:]) for message, full in messages]
        full, kv_only = (np.concatenate(part) for part in zip(*tokens))
        return Exchange(
            sent=[message.size for message, _ in messages],
            sent_full=[full for _, full in messages],
            received=np.bincount(self.owner[needs[rank]], minlength=self.size).tolist(),
            full=full_row[full].astype(np.int32),
            kv_only=kv_only_row[kv_only].astype(np.int32),
        )

    def _message(self, roles: Sequence[Role], needed: np.ndarray, source: int) -> tuple[np.ndarray, int]:
        """The tokens that ``source`` sends a rank with these needs, FULL ones first, and how many are FULL."""
        tokens = np.flatnonzero(needed & (self.owner == source))
        full = np.array([*roles, Role.SKIP])[self.group[tokens]] == Role.FULL
        return np.concatenate([tokens[full], tokens[~full]]), int(full.sum())


def quotas(group: np.ndarray, groups: int, ranks: int, multiple: int) -> list[int]:
    """Rows of each group on each of ``ranks`` ranks, multiples of ``multiple`` that hold all tokens together."""
    counts = np.bincount(group, minlength=groups)[:groups]
    return (-(-counts // (ranks * multiple)) * multiple).tolist()


def attention_load(
    group: np.ndarray, document: np.ndarray, roles_of_layers: Sequence[Sequence[Role]], pair_cost: int
) -> np.ndarray:
    """Work of each token's queries in all layers, int64 [t]: ``pair_cost`` for each visible key."""
    load, first = np.zeros(group.size, np.int64), np.diff(document, prepend=-1) != 0
    for roles in set(map(tuple, roles_of_layers)):
        visible = visible_keys(np.array([*roles, Role.SKIP])[group], first)
        load += visible * (pair_cost * sum(map(roles.__eq__, roles_of_layers)))
    return load


def place(group: np.ndarray, document: np.ndarray, load: np.ndarray, quota: Sequence[int], size: int) -> Placement:
    """The placement of t tokens on ``size`` ranks (see this module).

    Args:
        group: [t], group of each token; that of padding comes after the last.
        document: [t], number of the document, ascending.
        load: [t], work of each token that quotas do not balance, int64.
        quota: rows of each group on a rank, of all its ranks of sequence parallelism.
    """
    starts = np.flatnonzero(np.diff(document, prepend=-1))
    starts = starts[group[starts] < len(quota)]  # padding is a document of its own
    stops = np.append(np.flatnonzero(np.diff(document)) + 1, group.size)
    stops = stops[np.searchsorted(stops, starts, side="right")]
    sums = np.append(0, load.cumsum())
    loads = sums[stops] - sums[starts]
    number = np.full(group.size, -1)
    number[starts] = np.arange(starts.size)
    number = np.where(group < len(quota), np.maximum.accumulate(number), -1)
    real = number >= 0
    flat = number[real] * len(quota) + group[real]
    counts = np.bincount(flat, minlength=starts.size * len(quota)).reshape(starts.size, len(quota))
    is_long = (loads * 2 * size > loads.sum()) | (4 * counts > 3 * np.array(quota)).any(1)

    ranks = _Ranks(group, load, quota, size)
    largest_first = np.lexsort((-loads, -counts.sum(1)))  # by rows, then load: what does not fit whole is then short
    owner_of_document = np.full(starts.size + 1, -1)  # the last entry is that of padding
    for d in largest_first[is_long[largest_first]].tolist():
        ranks.cut(slice(starts[d], stops[d]))
    for d in largest_first[~is_long[largest_first]].tolist():
        owner_of_document[d] = ranks.take(counts[d].tolist(), int(loads[d]), slice(starts[d], stops[d]))
    owner = np.where(ranks.owner >= 0, ranks.owner, owner_of_document[number])
    return Placement(owner, size, group, document)


class _Ranks:
    """Ranks while documents are placed.

    Attributes:
        owner: [t], the rank of the tokens of documents that were cut, else -1.
    """

    def __init__(self, group: np.ndarray, load: np.ndarray, quota: Sequence[int], size: int):
        self.owner = np.full(group.size, -1)
        self._group, self._load = group, load
        self._room = [list(quota) for _ in range(size)]
        self._loads = [0] * size

    def cut(self, document: slice) -> None:
        """Place a long document: in each of its groups, two blocks of rows to each rank."""
        group = self._group[document]
        for g in np.unique(group).tolist():
            rows = np.flatnonzero(group == g) + document.start
            shares = self._shares(g, rows.size)
            first = [n // 2 for n in shares]
            blocks = [*first, *(n - f for n, f in zip(shares[::-1], first[::-1]))]
            order = [*range(len(shares)), *reversed(range(len(shares)))]
            self._give(rows, np.repeat(order, blocks), g)

    def take(self, counts: list[int], load: int, document: slice) -> int:
        """Place a short document of ``counts`` rows of each group; returns its rank. Of rows without room there, the
        first ones, which see least, go to ranks with room."""
        needed = [(g, n) for g, n in enumerate(counts) if n]
        ranks = range(len(self._room))
        fitting = [r for r in ranks if all(self._room[r][g] >= n for g, n in needed)]
        if fitting:
            rank = min(fitting, key=self._loads.__getitem__)
            self._loads[rank] += load
            for g, n in needed:
                self._room[rank][g] -= n
            return rank
        rank = max(ranks, key=lambda r: (sum(min(self._room[r][g], n) for g, n in needed), -self._loads[r], -r))
        group = self._group[document]
        for g, n in needed:
            rows = np.flatnonzero(group == g) + document.start
            shares = [0] * len(self._room)
            shares[rank] = min(self._room[rank][g], n)
            order = sorted((r for r in ranks if r != rank), key=lambda r: (-self._room[r][g], r))
            for r in order:
                shares[r] = min(self._room[r][g], n - sum(shares))
            self._give(rows, np.repeat([*order, rank], [*(shares[r] for r in order), shares[rank]]), g)
        return rank

    def _give(self, rows: np.ndarray, owners: np.ndarray, g: int) -> None:
        self.owner[rows] = owners
        for rank in np.unique(owners).tolist():
            own = rows[owners == rank]
            self._room[rank][g] -= own.size
            self._loads[rank] += int(self._load[own].sum())

    def _shares(self, g: int, rows: int) -> list[int]:
        """How many of so many rows of a group each rank takes, so that all then have equal room, as far as possible."""
        room = [of_rank[g] for of_rank in self._room]
        left = sum(room) - rows
        order = sorted(range(len(room)), key=lambda r: (room[r], -r))
        kept = list(room)
        for place, rank in enumerate(order):
            kept[rank] = min(room[rank], left // (len(room) - place))
            left -= kept[rank]
        return [r - k for r, k in zip(room, kept)]
