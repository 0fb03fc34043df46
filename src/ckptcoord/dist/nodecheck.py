"""The ranks of a node read from one page cache, so each tensor is checked once a node."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ckptcoord.dist.messages import as_dict
from ckptcoord.dist.shardset import key_of
from ckptcoord.errors import ConfigError
from ckptcoord.plan.placement import Piece, deal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.core.sharing import StateComponent
    from ckptcoord.dist.session import Session
    from ckptcoord.dist.shardset import Proofs, ShardSet, Want
    from ckptcoord.repo.readers import Proof

_FINGERPRINT = re.compile("[0-9a-f]{32}")  # an XXH3-128


class NodeCheck:
    """This rank's part of checking what its node reads, and what the others found.

    What another rank was to check and did not is checked here: ranks need not want the same.

    Args:
        session: of the coordinator.
        shards: that are loaded from.

    Attributes:
        found: of what was checked, what it is held to when it is read.
    """

    def __init__(self, session: Session, shards: ShardSet) -> None:
        self._session = session
        self._shards = shards
        self._rank = session.world.rank
        self._node = next(node for node in session.topology.nodes if self._rank in node)
        self._alone: list[Want] = []
        self._shared: dict[tuple[str, str], tuple[Want, Piece]] = {}
        self.found: Proofs = {}

    def mates(self, component: StateComponent) -> tuple[int, ...]:
        """The ranks of this node that load the same copy of a component, this one among them."""
        return tuple(rank for rank in self._session.scope(component).readers if rank in self._node)

    def add(self, want: Want, mates: Sequence[int]) -> None:
        """Something that all these ranks want."""
        key = key_of(want)
        if len(mates) == 1:
            self._alone.append(want)
        else:
            nbytes = want[0][1].spec.nbytes
            piece = Piece(name="/".join(key), nbytes=nbytes, holders=tuple(mates))
            self._shared[key] = want, piece

    def run(self) -> None:
        """Check this rank's part and let the others know.

        Raises:
            CorruptError, StorageError: the first failure.
        """
        dealt = deal([piece for _, piece in self._shared.values()]).get(self._rank, [])
        mine = {piece.name for piece in dealt}
        part = [want for want, piece in self._shared.values() if piece.name in mine]
        self._check([*self._alone, *part])
        if self._shared:
            found: dict[str, JsonValue] = {}
            for path, name in map(key_of, part):
                proof = self.found[path, name]
                as_dict(found.setdefault(path, {}))[name] = None if proof is None else proof.hex()
            self._session.world.post("checked", found, deadline=self._session.deadline())

    def hear(self, needed: Iterable[Want]) -> None:
        """Take over what the others of this node found, and check what is needed and unknown still.

        Raises:
            CorruptError, StorageError: the first failure.
        """
        if self._shared:
            others = [rank for rank in self._node if rank != self._rank]
            posts = self._session.world.posts("checked", others, deadline=self._session.deadline())
            for post in posts.values():
                for path, names in as_dict(post).items():
                    for name, proof in as_dict(names).items():
                        self.found[path, name] = _proof(proof)
        self._check([want for want in needed if key_of(want) not in self.found])

    def _check(self, wanted: list[Want]) -> None:
        self.found |= self._shards.check(wanted, threads=self._session.config.io_threads)


def _proof(value: JsonValue) -> Proof:
    """A fingerprint in hex, or null."""
    if value is None:
        return None
    if not isinstance(value, str) or not _FINGERPRINT.fullmatch(value):
        raise ConfigError(field="message", why=f"has the fingerprint {ascii(value)[:80]}")
    return bytes.fromhex(value)
