"""Who writes what, into which file. Pure: every rank has the same answer from the same facts."""

from __future__ import annotations

import heapq
import re
from collections import Counter
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, TypeAlias

from ckptcoord.core.sharing import ComponentSpec, SharingPattern
from ckptcoord.core.topology import GroupLayout, Scope, ScopeKind, Topology
from ckptcoord.errors import ConfigError, NotInGroupError, ReplicationError, UnknownGroupError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_DIGITS = re.compile(r"([0-9]+)")
_Heap: TypeAlias = "list[tuple[int, int]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A tensor, or the part of one, that is written once; any of `holders` can write it."""

    name: str
    nbytes: int
    holders: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """One safetensors file: `names` in natural order, `nbytes` of data, without the header."""

    path: str
    component: str
    scope: Scope
    writer: int
    names: tuple[str, ...]
    nbytes: int


# --- copies ---------------------------------------------------------------------------------------


def scopes_of(spec: ComponentSpec, topology: Topology) -> tuple[Scope, ...]:
    """Every copy of a component, in the order of their indices.

    Raises:
        UnknownGroupError: the topology has no group of that name.
    """
    match spec.pattern:
        case SharingPattern.GLOBAL | SharingPattern.REPLICATED:
            return (_job_scope(spec, topology),)
        case SharingPattern.PER_RANK:
            return tuple(_rank_scope(rank) for rank in range(topology.world_size))
        case SharingPattern.PER_NODE:
            return tuple(_node_scope(*numbered) for numbered in enumerate(topology.nodes))
        case SharingPattern.PER_GROUP:
            group = _group(spec, topology)
            return tuple(_group_scope(group, index) for index in range(len(group.instances)))


def scope_of(spec: ComponentSpec, topology: Topology, rank: int) -> Scope:
    """The copy of a component that a rank reads.

    Raises:
        UnknownGroupError: the topology has no group of that name.
        NotInGroupError: the rank is in no instance of the group.
        ConfigError: the topology has no such rank.
    """
    world_size = topology.world_size
    if not 0 <= rank < world_size:
        raise ConfigError(field="rank", why=f"{rank} is not in a world of {world_size}")
    match spec.pattern:
        case SharingPattern.GLOBAL | SharingPattern.REPLICATED:
            return _job_scope(spec, topology)
        case SharingPattern.PER_RANK:
            return _rank_scope(rank)
        case SharingPattern.PER_NODE:
            return next(
                _node_scope(i, node) for i, node in enumerate(topology.nodes) if rank in node
            )
        case SharingPattern.PER_GROUP:
            group = _group(spec, topology)
            for index, members in enumerate(group.instances):
                if rank in members:
                    return _group_scope(group, index)
            raise NotInGroupError(component=spec.key, group=group.name, rank=rank)


def _job_scope(spec: ComponentSpec, topology: Topology) -> Scope:
    everyone = tuple(range(topology.world_size))
    writers = (0,) if spec.pattern is SharingPattern.GLOBAL else everyone
    return Scope(kind=ScopeKind.JOB, index=0, writers=writers, readers=everyone)


def _rank_scope(rank: int) -> Scope:
    return Scope(kind=ScopeKind.RANK, index=rank, writers=(rank,), readers=(rank,))


def _node_scope(index: int, node: tuple[int, ...]) -> Scope:
    # Ranks of a node stand in local order, so its leader (local rank 0) is the first.
    readers = tuple(sorted(node))
    return Scope(kind=ScopeKind.NODE, index=index, writers=(node[0],), readers=readers)


def _group_scope(group: GroupLayout, index: int) -> Scope:
    members = group.instances[index]
    return Scope(
        kind=ScopeKind.GROUP, index=index, group_name=group.name, writers=members, readers=members
    )


def _group(spec: ComponentSpec, topology: Topology) -> GroupLayout:
    name = spec.group_name or ""
    group = topology.group(name)
    if group is None:
        known = tuple(group.name for group in topology.groups)
        raise UnknownGroupError(component=spec.key, group=name, known=known)
    return group


# --- striping -------------------------------------------------------------------------------------


def plan_shards(
    component: str,
    scope: Scope,
    pieces: Sequence[Piece],
    *,
    max_shard_size: int,
    loads: dict[int, int] | None = None,
) -> tuple[ShardPlan, ...]:
    """The files of one copy: each piece in exactly one, written by one of its holders.

    Where all pieces have the same holders, no two of these differ by more bytes than the largest
    piece has, whatever went before. The order of `pieces` and of their holders does not matter.

    Args:
        component: its key.
        scope: the copy.
        pieces: what the copy is made of; a name that comes twice is held by both pieces' holders.
        max_shard_size: bytes of data in a file; a larger piece gets a file of its own.
        loads: bytes that each rank writes already; what is planned here is added to it. Share one
            among components with the same writers, in an order that all these ranks agree on.

    Raises:
        ReplicationError: two holders have pieces of one name with different sizes.
        ConfigError: a piece has no holder among the writers or a negative size; no shard can hold
            anything.
    """
    if max_shard_size < 1:
        raise ConfigError(field="max_shard_size", why=f"is {max_shard_size}, not positive")
    if not pieces:
        return ()
    held = _by_holders(component, scope, _unite(component, pieces))
    planned = [
        (writer, shard)
        for writer, owned in sorted(_stripe(held, {} if loads is None else loads).items())
        for shard in _pack(owned, max_shard_size)
    ]
    stem = _stem(component, scope)
    return tuple(
        ShardPlan(
            path=_shard_path(stem, number, len(planned)),
            component=component,
            scope=scope,
            writer=writer,
            names=tuple([piece.name for piece in shard]),
            nbytes=sum([piece.nbytes for piece in shard]),
        )
        for number, (writer, shard) in enumerate(planned, start=1)
    )


def deal(pieces: Sequence[Piece]) -> dict[int, list[Piece]]:
    """Who works on which piece: of its holders, the one with the fewest bytes to work on so far.

    Pieces with other holders make no difference: a rank need not know of those that it has no part
    in. Names are unique. The order of `pieces` does not matter.
    """
    held: dict[tuple[int, ...], list[Piece]] = {}
    for piece in pieces:
        held.setdefault(tuple(sorted(set(piece.holders))), []).append(piece)
    dealt: dict[int, list[Piece]] = {}
    for holders, alike in held.items():
        for rank, part in _stripe({holders: alike}, {}).items():
            dealt.setdefault(rank, []).extend(part)
    return dealt


def _unite(component: str, pieces: Sequence[Piece]) -> Iterable[Piece]:
    """One piece for each name, with the holders of all pieces of that name."""
    by_name = {piece.name: piece for piece in pieces}
    if len(by_name) == len(pieces):
        return by_name.values()
    same: dict[str, list[Piece]] = {}
    for piece in pieces:
        same.setdefault(piece.name, []).append(piece)
    for name, found in same.items():
        _check_sizes(component, name, found)
    return [
        Piece(name=name, nbytes=found[0].nbytes, holders=tuple(r for p in found for r in p.holders))
        for name, found in same.items()
    ]


def _check_sizes(component: str, name: str, pieces: list[Piece]) -> None:
    sizes = sorted((rank, piece.nbytes) for piece in pieces for rank in piece.holders)
    counts = Counter(nbytes for _, nbytes in sizes)
    if len(counts) < 2:
        return
    # The size of most holders is the reference; of equally many, that of the lowest rank.
    reference, common = min(sizes, key=lambda held: (-counts[held[1]], held[0]))
    odd = sorted(held for held in sizes if held[1] != common)
    raise ReplicationError(
        component=component,
        tensor=name,
        minority=tuple(sorted({rank for rank, _ in odd})),
        reference=reference,
        apart=f"{odd[0][1]} bytes against {common}",
    )


def _by_holders(
    component: str, scope: Scope, pieces: Iterable[Piece]
) -> dict[tuple[int, ...], list[Piece]]:
    """The pieces of each set of holders, sorted; all checked."""
    writers = set(scope.writers)
    found: dict[tuple[int, ...], list[Piece]] = {}
    # Hashing the holders of every piece would cost ranks times pieces; most share one tuple.
    same_tuple: dict[int, list[Piece]] = {}
    for piece in pieces:
        alike = same_tuple.get(id(piece.holders))
        if alike is None:
            holders = tuple(sorted(set(piece.holders)))
            if not holders or not writers.issuperset(holders):
                raise ConfigError(
                    field=f"component {component!r}, tensor {piece.name!r}",
                    why=f"is held by ranks {holders}, where {scope.writers} write",
                )
            alike = same_tuple[id(piece.holders)] = found.setdefault(holders, [])
        if piece.nbytes < 0:
            raise ConfigError(
                field=f"component {component!r}, tensor {piece.name!r}",
                why=f"has {piece.nbytes} bytes",
            )
        alike.append(piece)
    return found


def _stripe(
    held: dict[tuple[int, ...], list[Piece]], loads: dict[int, int]
) -> dict[int, list[Piece]]:
    """Longest first, each piece to its least loaded holder, of equals to the lowest rank.

    Pieces with one holder go first: they leave no choice, and the others can even them out.
    """
    owned: dict[int, list[Piece]] = {}
    for (only, *others), pieces in held.items():
        if not others:
            owned[only] = list(pieces)
            loads[only] = loads.get(only, 0) + sum(piece.nbytes for piece in pieces)
    shared = [(holders, pieces) for holders, pieces in held.items() if len(holders) > 1]
    heaps = [[(loads.get(rank, 0), rank) for rank in holders] for holders, _ in shared]
    for heap in heaps:
        heapq.heapify(heap)
    # Names differ, so no two of these compare further than to the name.
    choices = [
        (-piece.nbytes, piece.name, at, piece)
        for at, (_, pieces) in enumerate(shared)
        for piece in pieces
    ]
    for negative_nbytes, _, at, piece in sorted(choices):
        writer = _least_loaded(heaps[at], loads)
        loads[writer] = loads.get(writer, 0) - negative_nbytes
        owned.setdefault(writer, []).append(piece)
    return owned


def _least_loaded(heap: _Heap, loads: dict[int, int]) -> int:
    """The rank at the top, once its load there is the true one.

    Loads only grow, so an entry that is out of date is too low: it comes up too early, never late.
    """
    while True:
        load, rank = heap[0]
        if load == loads.get(rank, 0):
            return rank
        heapq.heapreplace(heap, (loads[rank], rank))


def _pack(pieces: list[Piece], max_shard_size: int) -> list[list[Piece]]:
    """The pieces in natural order, cut before each one that no longer fits."""
    shards: list[list[Piece]] = []
    room = 0
    # `h.02` and `h.2` have one key: sorted by name before, they keep that order.
    for piece in sorted(sorted(pieces, key=attrgetter("name")), key=lambda p: natural_key(p.name)):
        if not shards or piece.nbytes > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(piece)
        room -= piece.nbytes
    return shards


def natural_key(name: str) -> list[str | int]:
    """For sorting with numbers by their value: `h.2` comes before `h.10`."""
    parts: list[str | int] = [*_DIGITS.split(name)]
    parts[1::2] = map(int, parts[1::2])
    return parts


# --- names ----------------------------------------------------------------------------------------
#
# A key has no dot and never ends like `-00001-of-00002` (core/sharing), and a label has no digits
# before its number (core/topology): a name tells component, copy and shard; no two are the same.


def state_path(component: str, scope: Scope, member: int | None = None) -> str:
    """Where a copy's state document is; a `member` (a rank) has one of its own."""
    own = "" if member is None else f".rank{member:05d}"
    return f"{_stem(component, scope)}{own}.state.json"


def index_path(component: str, scope: Scope) -> str:
    """Where the names of a copy's tensors are mapped to its shards, if it has several."""
    return f"{_stem(component, scope)}.safetensors.index.json"


def delta_path(path: str) -> str:
    """The name of a shard that holds deltas."""
    return f"{path.removesuffix('.safetensors')}.delta.safetensors"


def _stem(component: str, scope: Scope) -> str:
    return f"{component}.{scope.label}" if scope.label else component


def _shard_path(stem: str, number: int, count: int) -> str:
    if count == 1:
        return f"{stem}.safetensors"
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"
