"""Read delta files: tensors made again out of what is in the repository already.

A tensor is made part by part (`PART_BYTES`): the source's part is read into the destination, and
the coded part is decoded over it there. A chain of deltas goes through the same part one after
another, so that no second copy of a tensor is ever needed.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import numpy as np

from ckptcoord.codec.bounded import add_steps
from ckptcoord.codec.recipe import (
    CAST_FROM,
    DELTA_KEY,
    PART_BYTES,
    STEPS_DTYPE,
    How,
    Recipe,
    SourceFile,
    parse_recipes,
)
from ckptcoord.codec.tensorspec import ITEM_BYTES
from ckptcoord.errors import ConfigError, CorruptError
from ckptcoord.repo.shards import ShardReader, TensorEntry, TensorReader

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

    from ckptcoord.codec.tensorfile import TensorHeader
    from ckptcoord.core.digest import Digest
    from ckptcoord.store.base import Store

_MAX_LINKS = 100  # of a chain; what is longer goes in a circle


class SourceFiles:
    """The files that tensors are made out of, each opened when first needed; closes them all.

    Args:
        store: where they are.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._open: dict[tuple[str, Digest | None], TensorReader] = {}

    def open(self, file: SourceFile, folder: str = "") -> TensorReader:
        """The reader of a file, one for all who ask.

        Args:
            file: which.
            folder: of the delta that names it, which `./` stands for.

        Raises:
            CorruptError: it is not what it should be.
        """
        path = file.path if file.folder else f"{folder}/{file.path.removeprefix('./')}"
        key = path, file.digest
        with self._lock:
            if key not in self._open:
                self._open[key] = open_tensors(
                    self._store,
                    path,
                    expected=file.digest,
                    size_bytes=file.size_bytes or None,
                    sources=self,
                )
            return self._open[key]

    def close(self) -> None:
        """Close them all."""
        readers, self._open = self._open, {}  # each of them may close these again
        for reader in readers.values():
            reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_tensors(
    store: Store,
    path: str,
    *,
    expected: Digest | None,
    size_bytes: int | None = None,
    sources: SourceFiles | None = None,
) -> TensorReader:
    """Open a shard or a delta file, whichever it is; arguments and errors as for ShardReader.

    `sources` opens what a delta file's tensors are made out of; without it the reader has its own.
    """
    shard = ShardReader(store, path, expected=expected, size_bytes=size_bytes)
    if DELTA_KEY not in shard.header.metadata:
        return shard
    try:
        return DeltaReader(shard, sources or SourceFiles(store))
    except BaseException:
        shard.close()
        raise


class DeltaReader(TensorReader):
    """A delta file; its tensors read as if they stood there whole.

    Args:
        shard: the file itself; closed with this.
        sources: opens what its tensors are made out of; closed with this.

    Raises:
        CorruptError: its recipes are not sound.
        FormatVersionError: a newer ckptcoord wrote them.
    """

    part_bytes = PART_BYTES

    def __init__(self, shard: ShardReader, sources: SourceFiles) -> None:
        super().__init__()
        self.path = shard.path
        self._folder = shard.path.rpartition("/")[0]
        self._shard = shard
        self._sources = sources
        self._finite: set[str] = set()
        text = shard.header.metadata[DELTA_KEY]
        recipes = parse_recipes(text, shard.header, path=shard.path)
        stored = {entry.spec.name: entry for entry in shard.header.entries}
        self._makers = {one.spec.name: _Maker(one, stored.get(one.spec.name)) for one in recipes}
        self.recipes = {one.spec.name: one for one in recipes}
        self.header = replace(
            shard.header,
            entries=tuple(maker.entry(shard.header) for maker in self._makers.values()),
        )

    def read_range(self, entry: TensorEntry, offset: int, out: memoryview) -> None:
        """Make some parts of a tensor again; the last of them may be cut short by its end only."""
        maker = self._makers[entry.spec.name]
        self._check_chain(entry.spec.name)
        end = offset + out.nbytes
        if offset % PART_BYTES or (end % PART_BYTES and end != entry.spec.nbytes):
            raise ConfigError(field="offset", why=f"{offset} to {end} are no whole parts")
        for start in range(offset, end, PART_BYTES):
            part = out[start - offset : min(start + PART_BYTES, end) - offset]
            self._make(maker, start, part)

    def origin(self, name: str) -> tuple[TensorReader, TensorEntry] | None:
        """What a tensor is made out of, and its reader; None where nothing is needed.

        Raises:
            CorruptError: it is not there, not what it was, or of another shape or dtype.
            StorageError: it cannot be read.
        """
        recipe = self.recipes[name]
        if recipe.source is None:
            return None
        file, there = recipe.source
        try:
            reader = self._sources.open(file, self._folder)
        except CorruptError as error:
            raise self._unfit(name, there, error.what) from error
        entry = reader.find(there)
        if entry is None:
            raise self._unfit(name, there, f"{reader.path} does not hold it")
        spec = recipe.spec
        dtype = CAST_FROM[spec.dtype] if recipe.how is How.CAST else spec.dtype
        if (entry.spec.dtype, entry.spec.shape) != (dtype, spec.shape):
            form = f"{entry.spec.dtype}{list(entry.spec.shape)}"
            raise self._unfit(
                name, there, f"in {reader.path} it is {form}, not {dtype}{list(spec.shape)}"
            )
        return reader, entry

    def close(self) -> None:
        """Let go of the file and of what it is made out of."""
        self._shard.close()
        self._sources.close()

    def _check_chain(self, name: str) -> None:
        """Refuse a tensor whose chain has no end: reading it would not end either."""
        if name in self._finite:
            return
        reader, there = self, name
        for _ in range(_MAX_LINKS):
            origin = reader.origin(there)
            if origin is None or not isinstance(origin[0], DeltaReader):
                self._finite.add(name)
                return
            reader, there = origin[0], origin[1].spec.name
        raise CorruptError(
            path=self.path,
            why=f"tensor {name!r:.80} is made over {_MAX_LINKS} deltas, or out of itself",
        )

    def _make(self, maker: _Maker, offset: int, out: memoryview) -> None:
        recipe = maker.recipe
        origin = self.origin(recipe.spec.name)
        if origin is not None and recipe.how is How.CAST:
            _cast_range(*origin, offset, out, recipe.spec.dtype)
        elif origin is not None:
            reader, entry = origin
            reader.read_range(entry, offset, out)
        if recipe.how is How.CODED:
            self._decode(maker, offset // PART_BYTES, _array(out), recipe.spec.dtype)
        elif recipe.how is How.UPDATE:
            steps = np.empty(out.nbytes // ITEM_BYTES[recipe.spec.dtype], np.uint32)
            self._decode(maker, offset // PART_BYTES, steps.view(np.uint8), STEPS_DTYPE)
            add_steps(steps, _array(out), recipe.spec.dtype, recipe.step)

    def _decode(self, maker: _Maker, number: int, out: NDArray[np.uint8], dtype: str) -> None:
        from ckptcoord.codec.delta import DecodeError, decode  # late: numba takes a second

        stored = maker.stored
        assert stored is not None, "a coded tensor has its entry"
        size = maker.recipe.parts[number]
        coded = bytearray(size)
        self._shard.read_range(stored, maker.offsets[number], memoryview(coded))
        try:
            decode(memoryview(coded), out, dtype=dtype)
        except DecodeError as error:
            raise CorruptError(
                path=self.path, why=f"tensor {maker.recipe.spec.name!r}: {error}"
            ) from error

    def _unfit(self, name: str, there: str, why: str) -> CorruptError:
        return CorruptError(
            path=self.path, why=f"tensor {name!r:.80} is made out of {there!r:.80}: {why}"
        )


class _Maker:
    """A recipe, and where its parts are."""

    def __init__(self, recipe: Recipe, stored: TensorEntry | None) -> None:
        self.recipe = recipe
        self.stored = stored
        self.offsets = [0]
        for size in recipe.parts:
            self.offsets.append(self.offsets[-1] + size)

    def entry(self, header: TensorHeader) -> TensorEntry:
        """What a reader sees: the tensor itself, and the place of what is stored of it."""
        begin, end = header.data_start, header.data_start
        if self.stored is not None:
            begin, end = self.stored.begin, self.stored.end
        return TensorEntry(spec=self.recipe.spec, begin=begin, end=end, digest=self.recipe.digest)


def _cast_range(
    reader: TensorReader, entry: TensorEntry, offset: int, out: memoryview, dtype: str
) -> None:
    """Fill `out` with a wider tensor's values from an offset in the narrow one's bytes."""
    from ckptcoord.codec.cast import cast  # late: numba takes a second

    ratio = ITEM_BYTES[entry.spec.dtype] // ITEM_BYTES[dtype]
    wide = memoryview(bytearray(out.nbytes * ratio))
    reader.read_range(entry, offset * ratio, wide)
    cast(_array(wide), entry.spec.dtype, _array(out), dtype)


def _array(view: memoryview) -> NDArray[np.uint8]:
    return np.frombuffer(view, np.uint8)
