"""What ranks want to read, and which of them has what several want to read or check (ADR 11)."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from ckptcoord.dist.messages import as_list
from ckptcoord.dist.shardset import key_of
from ckptcoord.plan.placement import Piece, deal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.dist.session import Session
    from ckptcoord.dist.shardset import Want

Key: TypeAlias = "tuple[str, str]"
"""The path of a shard, and the name of an entry there."""

_POST = "wanted"


class Wanted:
    """What this rank wants, and what others do. At most one in an operation announces.

    Args:
        session: of the coordinator.
        wants: of this rank.
        ranks: that may share it, this one among them; each of them names the same ones.
    """

    def __init__(self, session: Session, wants: Iterable[Want], ranks: Sequence[int]) -> None:
        self._session = session
        self._ranks = ranks
        self._sizes = {key_of(want): want[0][1].spec.nbytes for want in wants}

    def announce(self) -> None:
        """Let the other ranks know; a round has to follow before they ask."""
        said: list[JsonValue] = [[path, name, size] for (path, name), size in self._sizes.items()]
        self._session.world.post(_POST, said, deadline=self._session.deadline())

    def shared(self) -> dict[Key, Piece]:
        """All that more than one of the ranks wants, and who; the same on each of them."""
        world, own = self._session.world, self._session.world.rank
        others = [rank for rank in self._ranks if rank != own]
        posts = world.posts(_POST, others, deadline=self._session.deadline())
        said = {rank: _sizes(posts[rank]) for rank in posts} | {own: self._sizes}
        holders: dict[Key, list[int]] = {}
        for rank in sorted(said):
            for key in said[rank]:
                holders.setdefault(key, []).append(rank)
        return {
            key: Piece(name="/".join(key), nbytes=said[ranks[0]][key], holders=tuple(ranks))
            for key, ranks in holders.items()
            if len(ranks) > 1
        }


def dealt_out(pieces: Iterable[Piece]) -> dict[str, int]:
    """By a piece's name, the one of its holders that has it to do."""
    return {piece.name: rank for rank, dealt in deal(list(pieces)).items() for piece in dealt}


def _sizes(said: JsonValue) -> dict[Key, int]:
    found = {}
    for one in as_list(said):
        path, name, nbytes = as_list(one)
        found[str(path), str(name)] = int(str(nbytes))
    return found
