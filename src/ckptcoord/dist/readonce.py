"""Loads that read each byte once in the whole job: one rank reads it and sends it on (ADR 11).

For storage that is slow or billed by the byte. What several ranks want is dealt out among them, and
they go through it in one order, so that whoever sends or receives meets the others there. Each part
is followed by a byte that says whether it is sound; each entry ends with one for its digest.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as c10d

from ckptcoord.dist.session import heard
from ckptcoord.dist.shardset import key_of
from ckptcoord.dist.wanted import Wanted, dealt_out
from ckptcoord.errors import CkptError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ckptcoord.dist.session import Session
    from ckptcoord.dist.shardset import ShardSet, Want
    from ckptcoord.plan.placement import Piece
    from ckptcoord.repo.readers import Out, Sink

_SENT_BYTES = 4 << 20  # of a message
_SOUND, _FAILED = 0, 1


class SharedReads:
    """This rank's part of reading what ranks want, each entry by one of them.

    Args:
        session: of the coordinator.
        shards: that are loaded from.
        wanted: what this rank wants, and where to.
    """

    def __init__(self, session: Session, shards: ShardSet, wanted: Sequence[Want]) -> None:
        self._session = session
        self._shards = shards
        self._wanted = {key_of(want): want for want in wanted}
        self._ranks = Wanted(session, wanted, range(session.world.size))
        self._rank = session.world.rank

    def announce(self) -> None:
        """Let the other ranks know what this one wants; a round has to follow.

        Raises:
            ConfigError: there is no way to send.
        """
        world = self._session.world
        if world.size > 1 and not (c10d.is_available() and c10d.is_initialized()):
            raise ConfigError(
                field="read_once",
                why="needs torch.distributed, over which ranks send one another what they read",
                help="Call init_process_group first, or load without read_once",
            )
        self._ranks.announce()

    def read(self) -> int:
        """Read and receive all that is wanted; returns the bytes that this rank read itself.

        What another rank could not read is not what was saved; that rank raises, and this one must
        hear of it in a round before it uses anything.

        Raises:
            CorruptError, StorageError: the first failure of this rank.
            RuntimeError: another rank fell silent.
        """
        pieces = self._ranks.shared()
        if pieces:
            self._group()  # made by all ranks, those among them that will share nothing
        readers = dealt_out(pieces[key] for key in sorted(pieces))
        alone = [want for key, want in self._wanted.items() if key not in pieces]
        threads = self._session.config.io_threads
        own = heard(lambda: self._shards.read(alone, threads=threads))
        failure = own if isinstance(own, CkptError) else None
        nbytes = sum(want[0][1].spec.nbytes for want in alone)
        for key, piece in sorted(pieces.items(), key=lambda item: item[0]):
            reader = readers[piece.name]
            if self._rank == reader:
                nbytes += piece.nbytes
                failure = self._send(key, piece, failed=failure) or failure
            elif self._rank in piece.holders:
                self._receive(key, reader)
        if failure is not None:
            raise failure
        return nbytes

    def _send(
        self, key: tuple[str, str], piece: Piece, *, failed: CkptError | None
    ) -> CkptError | None:
        """Read an entry and send it; after a failure, only word of that is sent."""
        source, out = self._wanted[key]
        others = [rank for rank in piece.holders if rank != self._rank]
        tee = _Tee(_sink(out), self._group(), others)
        if failed is None:
            read = heard(lambda: self._shards.read([(source, tee)], threads=1))
            failed = read if isinstance(read, CkptError) else None
        tee.end(sound=failed is None)
        return failed

    def _receive(self, key: tuple[str, str], reader: int) -> None:
        """Take an entry from the rank that reads it; where that failed, it says so in the round."""
        out = _sink(self._wanted[key][1])
        out.begin()
        message = torch.empty(_SENT_BYTES + 1, dtype=torch.uint8)
        data: NDArray[np.uint8] = message.numpy()
        left = out.nbytes
        while True:
            size = min(left, _SENT_BYTES)
            c10d.recv(message[: size + 1], src=reader, group=self._group())
            if data[size] != _SOUND or not size:
                return
            out.take(data[:size].data)
            left -= size

    def _group(self) -> c10d.ProcessGroup:
        """A group of all ranks for bytes; made by all of them at once, at the first load of such.

        Raises:
            RuntimeError: they cannot reach one another.
        """
        session = self._session
        if session.channel is None:
            timeout = timedelta(seconds=session.config.timeout_s)
            session.channel = c10d.new_group(backend="gloo", timeout=timeout)
        channel = session.channel
        assert isinstance(channel, c10d.ProcessGroup), "all ranks are in it"
        return channel


class _Tee:
    """Passes on what is read, and keeps it, too."""

    def __init__(self, own: Sink, group: c10d.ProcessGroup, others: Sequence[int]) -> None:
        self.nbytes = own.nbytes
        self._own = own
        self._group = group
        self._others = others
        self._message = torch.empty(_SENT_BYTES + 1, dtype=torch.uint8)
        self._data = self._message.numpy()
        self._filled = 0
        self._left = own.nbytes

    def begin(self) -> None:
        """The bytes will come from the first one on."""
        self._own.begin()

    def take(self, part: memoryview) -> None:
        """The next bytes."""
        self._own.take(part)
        data = np.frombuffer(part, np.uint8)
        while len(data):
            room = min(_SENT_BYTES, self._left) - self._filled
            now, data = data[:room], data[room:]
            self._data[self._filled : self._filled + len(now)] = now
            self._filled += len(now)
            if len(now) == room:
                self._send(_SOUND)

    def end(self, *, sound: bool) -> None:
        """All is sent, and known to be sound; or nothing more will be."""
        self._filled = min(_SENT_BYTES, self._left)
        self._send(_SOUND if sound else _FAILED)

    def _send(self, word: int) -> None:
        self._data[self._filled] = word
        message = self._message[: self._filled + 1]
        for work in [c10d.isend(message, rank, group=self._group) for rank in self._others]:
            assert work is not None, "this rank is in the group"
            work.wait()
        self._left -= self._filled
        self._filled = 0


class _Straight:
    """Flat memory that is filled from its start."""

    def __init__(self, view: memoryview) -> None:
        self.nbytes = view.nbytes
        self._view = view
        self._at = 0

    def begin(self) -> None:
        """The bytes will come from the first one on."""
        self._at = 0

    def take(self, part: memoryview) -> None:
        """The next bytes."""
        self._view[self._at : self._at + part.nbytes] = part
        self._at += part.nbytes


def _sink(out: Out) -> Sink:
    return _Straight(out) if isinstance(out, memoryview) else out
