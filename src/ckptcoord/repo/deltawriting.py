"""Write delta files: of each tensor, only what is not in the repository already."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptcoord.codec.bounded import GivenUp
from ckptcoord.codec.digest import XXH3_BYTES
from ckptcoord.codec.recipe import (
    DELTA_KEY,
    MAX_PART_BYTES,
    How,
    Recipe,
    part_count,
    render_recipes,
)
from ckptcoord.codec.tensorfile import room_for_header
from ckptcoord.codec.tensorspec import TensorSpec
from ckptcoord.errors import InvalidNameError
from ckptcoord.repo.deltacoding import AHEAD_BYTES, LEAST_PRINTED_BYTES, Encoder
from ckptcoord.repo.deltas import SourceFiles
from ckptcoord.repo.streams import ShardStream
from ckptcoord.repo.threads import Threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from ckptcoord.core.digest import Digest
    from ckptcoord.repo.deltacoding import Coded, DeltaSource, Home, Job
    from ckptcoord.repo.shards import WrittenFile
    from ckptcoord.store.base import Store

_LONG_FLOAT = -1.2345678901234567e-300  # no float's text is longer
_MOST_GIVEN_UP = GivenUp(max_abs=_LONG_FLOAT, relative_l2=_LONG_FLOAT)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenDelta:
    """A durable delta file.

    Attributes:
        file: it.
        recipes: of its tensors, in the order that they were given.
        made: by name, what readers take for a tensor of which something was given up.
    """

    file: WrittenFile
    recipes: tuple[Recipe, ...]
    made: Mapping[str, NDArray[np.uint8]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaFile:
    """A delta file to be written.

    Attributes:
        path: in the store.
        level: how much time a smaller file is worth.
    """

    path: str
    tensors: Sequence[DeltaSource]
    level: str


def _ignore() -> None:
    """Nobody asked."""


def write_delta(  # noqa: PLR0913 (each is a part of the file)
    store: Store,
    path: str,
    tensors: Sequence[DeltaSource],
    *,
    homes: Callable[[Digest], Home | None],
    level: str,
    threads: int,
    coded: Callable[[], None] = _ignore,
) -> WrittenDelta:
    """Write tensors as a new delta file, and sync it: `write_deltas` of a single one."""
    file = DeltaFile(path=path, tensors=tensors, level=level)
    (written,) = write_deltas(store, (file,), homes=homes, threads=threads, coded=coded)
    return written


def write_deltas(
    store: Store,
    files: Iterable[DeltaFile],
    *,
    homes: Callable[[Digest], Home | None],
    threads: int,
    coded: Callable[[], None] = _ignore,
) -> list[WrittenDelta]:
    """Write new delta files one after another, and sync each; `coded` is called when one is coded.

    A tensor whose bytes are at home somewhere, or are those of another one of this save, is only
    named; one that is the cast of another one is said to be that; of any other, what differs from
    its base is coded. Tensors are written while later ones are coded: 64 MiB of them, or a larger
    one, are under way. What something is given up of is held in memory as readers will have it.

    A file is asked for, and its tensors are read if they are 64 MiB at most, while the one before
    is coded and written.

    Raises:
        StorageError, BaseUnreadableError: the storage refused, or a base is damaged.
        ConfigError: a source gives other bytes than its spec says, or its base is of another shape
            or dtype.
        InvalidNameError: a name is given twice.
    """
    written = []
    with SourceFiles(store) as sources, ExitStack() as stack:
        pool = Threads(threads, "ckptcoord-encode")
        stack.callback(pool.shutdown, cancel_futures=True)
        queue = _Queue(files, lambda file: Encoder(sources, homes, file.level, pool))
        while (begun := queue.take()) is not None:
            jobs = begun.jobs()
            coding = begun.encoder.run(jobs, begun_all=queue.look_ahead)
            written.append(_write(store, begun.file.path, jobs, coding, threads, coded))
    return written


def _write(
    store: Store,
    path: str,
    jobs: Sequence[Job],
    coding: Iterable[Coded],
    threads: int,
    coded: Callable[[], None],
) -> WrittenDelta:
    """Write one file of what comes of its jobs."""
    recipes, made = [], {}
    with (
        store.create(path) as writer,
        ShardStream(writer, path, room_bytes=_room_for(jobs), threads=threads) as stream,
    ):
        for one in coding:
            recipes.append(one.recipe)
            if one.recipe.is_stored:
                stream.put(*one.entry())
            if one.made is not None:
                made[one.recipe.spec.name] = one.made
        coded()
        file = stream.finish({DELTA_KEY: render_recipes(recipes)})
    return WrittenDelta(file=file, recipes=tuple(recipes), made=made)


@dataclass(frozen=True, slots=True)
class _Begun:
    """A file whose tensors are being recognised; `jobs` waits for the end of that."""

    file: DeltaFile
    encoder: Encoder
    jobs: Callable[[], list[Job]]


class _Queue:
    """The files that are to be written; small ones are begun before it is their turn."""

    def __init__(self, files: Iterable[DeltaFile], encoder: Callable[[DeltaFile], Encoder]) -> None:
        self._files = iter(files)
        self._encoder = encoder
        self._file: DeltaFile | None = None
        self._begun: _Begun | None = None

    def look_ahead(self) -> None:
        """Ask for the next file, and begin it unless it is large."""
        if self._file is not None:
            return
        self._file = next(self._files, None)
        if self._file is None:
            return
        _check_names(self._file.tensors)
        if sum(tensor.spec.nbytes for tensor in self._file.tensors) <= AHEAD_BYTES:
            self._begun = self._begin(self._file)

    def take(self) -> _Begun | None:
        """The next file, begun; None after the last."""
        self.look_ahead()
        file, begun = self._file, self._begun
        self._file = self._begun = None
        return self._begin(file) if begun is None and file is not None else begun

    def _begin(self, file: DeltaFile) -> _Begun:
        encoder = self._encoder(file)
        return _Begun(file, encoder, encoder.recognise(file.tensors))


def _room_for(jobs: Sequence[Job]) -> int:
    """What the header will not exceed; the recipes are known but for what coding gives."""
    recipes = [_roomiest(job) for job in jobs]
    specs = [
        TensorSpec(name=recipe.spec.name, dtype="U8", shape=(sum(recipe.parts),))
        for recipe in recipes
        if recipe.is_stored
    ]
    return room_for_header(specs, {DELTA_KEY: render_recipes(recipes)})


def _roomiest(job: Job) -> Recipe:
    """The recipe whose text is the longest that a job's may turn out to have."""
    recipe = job.recipe
    if not recipe.is_stored:
        return recipe
    count = part_count(recipe.spec.nbytes)
    printed = count if recipe.spec.nbytes >= LEAST_PRINTED_BYTES else 0
    return Recipe(
        spec=recipe.spec,
        digest=recipe.digest,
        how=How.UPDATE if job.is_lossy else recipe.how,
        source=recipe.source,
        parts=(MAX_PART_BYTES,) * count,
        prints=bytes(XXH3_BYTES * printed),
        step=_LONG_FLOAT,
        given_up=_MOST_GIVEN_UP if job.is_lossy else None,
    )


def _check_names(tensors: Sequence[DeltaSource]) -> None:
    names = Counter(tensor.spec.name for tensor in tensors)
    for name, count in names.items():
        if count > 1:
            raise InvalidNameError(kind="tensor", name=name, why="is given twice")
