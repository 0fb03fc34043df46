"""Read and write delta files: tensors made again out of what is in the repository already.

A tensor is made part by part (`PART_BYTES`): the source's part is read into the destination, and
the coded part is decoded over it there. A chain of deltas goes through the same part one after
another, so that no second copy of a tensor is ever needed.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self, TypeVar

import numpy as np

from ckptcoord.codec.bounded import (
    FLOAT_DTYPES,
    UPDATE_DTYPES,
    add_steps,
    distance,
    round_mantissa,
    step_of,
    to_steps,
)
from ckptcoord.codec.digest import blake3_digest
from ckptcoord.codec.recipe import (
    CAST_FROM,
    DELTA_KEY,
    PART_BYTES,
    How,
    Recipe,
    SourceFile,
    parse_recipes,
    part_count,
    render_recipes,
)
from ckptcoord.codec.tensorspec import ITEM_BYTES
from ckptcoord.core.lossy import EXACT, Lossy
from ckptcoord.errors import ConfigError, CorruptError, InvalidNameError
from ckptcoord.repo.shards import (
    ShardReader,
    TensorEntry,
    TensorReader,
    TensorSource,
    TensorSpec,
    WrittenFile,
    write_shard,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from numpy.typing import NDArray

    from ckptcoord.codec.tensorfile import TensorHeader
    from ckptcoord.core.digest import Digest
    from ckptcoord.store.base import Store

_STEPS = "U32"  # what the steps of an update are coded as
_MAX_LINKS = 100  # of a chain; what is longer goes in a circle
_T = TypeVar("_T")
_R = TypeVar("_R")


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
            self._decode(maker, offset // PART_BYTES, steps.view(np.uint8), _STEPS)
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


# --- writing -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """Where a tensor's bytes are already."""

    file: SourceFile
    name: str
    spec: TensorSpec
    digest: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaSource:
    """A tensor to be written into a delta file.

    Attributes:
        spec: what it is.
        read: gives its bytes, 1-D contiguous uint8; called once.
        base: what its delta is against; None where there is nothing.
        known: gives the digest of its bytes where that can be told without hashing them all anew.
        wide: where a wider float of the same shape is in this save, which it may be a cast of: the
            file, the name there, and its bytes.
        lossy: what may be given up of it.
    """

    spec: TensorSpec
    read: Callable[[], NDArray[np.uint8]]
    base: Home | None = None
    known: Callable[[NDArray[np.uint8]], Digest | None] = lambda _: None
    wide: tuple[str, str, Callable[[], NDArray[np.uint8]]] | None = None
    lossy: Lossy = EXACT


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenDelta:
    """A durable delta file.

    Attributes:
        file: it.
        recipes: of its tensors, in the order that they were given.
    """

    file: WrittenFile
    recipes: tuple[Recipe, ...]


def write_delta(
    store: Store,
    path: str,
    tensors: Sequence[DeltaSource],
    *,
    homes: Callable[[Digest], Home | None],
    level: str,
    threads: int,
) -> WrittenDelta:
    """Write tensors as a new delta file, and sync it.

    A tensor whose bytes are at home somewhere is only named; one that is the cast of another one is
    said to be that; of any other, what differs from its base is coded. Beside the coded bytes, a
    part of each thread's tensor and of its base are held in memory.

    Raises:
        StorageError, CorruptError: the storage refused, or a base cannot be read.
        ConfigError: a source gives other bytes than its spec says, or its base is of another shape
            or dtype.
        InvalidNameError: a name is given twice.
    """
    _check_names(tensors)
    with SourceFiles(store) as files:
        encoder = _Encoder(files, homes, level, threads)
        recipes, coded = encoder.run(tensors)
        written = write_shard(
            store,
            path,
            [_stored(name, parts) for name, parts in coded.items()],
            metadata={DELTA_KEY: render_recipes(recipes)},
            threads=threads,
        )
    return WrittenDelta(file=written, recipes=recipes)


class _Encoder:
    """Recipes and coded bytes of several tensors, made in `threads` threads."""

    def __init__(
        self,
        files: SourceFiles,
        homes: Callable[[Digest], Home | None],
        level: str,
        threads: int,
    ) -> None:
        from ckptcoord.codec.delta import Level  # late: numba takes a second

        self._files = files
        self._homes = homes
        self._level = Level(level)
        self._threads = threads

    def run(
        self, tensors: Sequence[DeltaSource]
    ) -> tuple[tuple[Recipe, ...], dict[str, list[bytes]]]:
        """The recipe of each, and the coded parts of those that have some."""
        with ThreadPoolExecutor(self._threads, "ckptcoord-encode") as pool:
            known = list(_mapped(pool, self._recognise, tensors))
            jobs = [
                (tensor, found, number)
                for tensor, found in zip(tensors, known, strict=True)
                if found.recipe.is_stored
                for number in range(part_count(tensor.spec.nbytes))
            ]
            parts = _mapped(pool, lambda job: self._part(*job), jobs)
            coded: dict[str, list[bytes]] = {}
            for (tensor, _, _), part in zip(jobs, parts, strict=True):
                coded.setdefault(tensor.spec.name, []).append(part)
        recipes = []
        for found in known:
            recipe = found.recipe
            if recipe.is_stored:
                own = coded.setdefault(recipe.spec.name, [])
                recipe = replace(recipe, parts=tuple(map(len, own)))
            recipes.append(recipe)
        return tuple(recipes), coded

    def _recognise(self, tensor: DeltaSource) -> _Found:
        """What it is, and the bytes that are to be coded, if any."""
        spec, data = tensor.spec, _bytes_of(tensor)
        digest = tensor.known(data) or blake3_digest(data.data)
        home = self._homes(digest)
        if home is not None and _is_alike(home.spec, spec):
            source = home.file, home.name
            return _Found(Recipe(spec=spec, digest=digest, how=How.SAME, source=source))
        if tensor.wide is not None and _is_cast(tensor, data):
            file, name, _ = tensor.wide
            source = SourceFile(path=f"./{file}"), name
            return _Found(Recipe(spec=spec, digest=digest, how=How.CAST, source=source))
        if tensor.lossy != EXACT and spec.dtype in FLOAT_DTYPES and spec.shape and spec.nbytes:
            found = self._approximate(tensor, data)
            if found is not None:
                return found
        return _Found(
            Recipe(spec=spec, digest=digest, how=How.CODED, source=_against(tensor)), data
        )

    def _approximate(self, tensor: DeltaSource, data: NDArray[np.uint8]) -> _Found | None:
        """The same with something given up; None where nothing can be."""
        rule, base = tensor.lossy, tensor.base
        if base is not None and (rule.change_threshold or rule.update_fraction):
            held = np.empty(data.nbytes, np.uint8)
            self._read_base(base, 0, held)
            found = _left_out(tensor, base, data, held) or _in_steps(tensor, data, held)
            if found is not None:
                return found
        if rule.mantissa_bits is not None:
            return self._rounded(tensor, data, rule.mantissa_bits)
        return None

    def _rounded(self, tensor: DeltaSource, data: NDArray[np.uint8], bits: int) -> _Found | None:
        spec = tensor.spec
        rounded = round_mantissa(data, spec.dtype, bits)
        given_up = distance(data, rounded, spec.dtype)
        if not given_up.max_abs:
            return None
        digest = blake3_digest(rounded.data)
        home = self._homes(digest)
        same = home is not None and _is_alike(home.spec, spec)
        recipe = Recipe(
            spec=spec,
            digest=digest,
            how=How.SAME if same else How.CODED,
            source=(home.file, home.name) if home is not None and same else _against(tensor),
            given_up=given_up,
        )
        return _Found(recipe, rounded)

    def _part(self, tensor: DeltaSource, found: _Found, number: int) -> bytes:
        from ckptcoord.codec.delta import encode  # late: numba takes a second

        dtype, base = tensor.spec.dtype, tensor.base
        if found.recipe.how is How.UPDATE:
            width = PART_BYTES // ITEM_BYTES[dtype] * ITEM_BYTES[_STEPS]
            steps = found.data[number * width : (number + 1) * width]
            return encode(steps, None, dtype=_STEPS, level=self._level)
        start = number * PART_BYTES
        new = found.data[start : start + PART_BYTES]
        held = None
        if base is not None:
            held = np.empty(new.nbytes, np.uint8)
            self._read_base(base, start, held)
        return encode(new, held, dtype=dtype, level=self._level)

    def _read_base(self, base: Home, start: int, out: NDArray[np.uint8]) -> None:
        reader = self._files.open(base.file)
        entry = reader.find(base.name)
        if entry is None or not _is_alike(entry.spec, base.spec):
            raise CorruptError(
                path=reader.path, why=f"does not hold {base.name!r} as its header said"
            )
        reader.read_range(entry, start, out.data)


@dataclass(frozen=True, slots=True)
class _Found:
    """What was decided of a tensor, and the bytes to be coded: its own, its steps, or none."""

    recipe: Recipe
    data: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))


def _against(tensor: DeltaSource) -> tuple[SourceFile, str] | None:
    base = tensor.base
    return None if base is None or not tensor.spec.nbytes else (base.file, base.name)


def _left_out(
    tensor: DeltaSource, base: Home, data: NDArray[np.uint8], held: NDArray[np.uint8]
) -> _Found | None:
    """A tensor that has changed too little to be written: it is its base."""
    if not tensor.lossy.change_threshold:
        return None
    given_up = distance(data, held, tensor.spec.dtype)
    if not given_up.relative_l2 < tensor.lossy.change_threshold:  # a NaN is no small change
        return None
    source = base.file, base.name
    return _Found(
        Recipe(spec=tensor.spec, digest=base.digest, how=How.SAME, source=source, given_up=given_up)
    )


def _in_steps(
    tensor: DeltaSource, data: NDArray[np.uint8], held: NDArray[np.uint8]
) -> _Found | None:
    """A change in whole steps."""
    spec, fraction = tensor.spec, tensor.lossy.update_fraction
    if not fraction or spec.dtype not in UPDATE_DTYPES:
        return None
    step = step_of(data, held, spec.dtype, fraction)
    if not step:
        return None
    steps = to_steps(data, held, spec.dtype, step)
    add_steps(steps, held, spec.dtype, step)
    given_up = distance(data, held, spec.dtype)
    if not math.isfinite(given_up.relative_l2):  # a step went beyond the largest float
        return None
    recipe = Recipe(
        spec=spec,
        digest=blake3_digest(held.data),
        how=How.UPDATE,
        source=_against(tensor),
        step=step,
        given_up=given_up,
    )
    return _Found(recipe, steps.view(np.uint8))


def _cast_range(
    reader: TensorReader, entry: TensorEntry, offset: int, out: memoryview, dtype: str
) -> None:
    """Fill `out` with a wider tensor's values from an offset in the narrow one's bytes."""
    from ckptcoord.codec.cast import cast  # late: numba takes a second

    ratio = ITEM_BYTES[entry.spec.dtype] // ITEM_BYTES[dtype]
    wide = memoryview(bytearray(out.nbytes * ratio))
    reader.read_range(entry, offset * ratio, wide)
    cast(_array(wide), entry.spec.dtype, _array(out), dtype)


def _is_cast(tensor: DeltaSource, data: NDArray[np.uint8]) -> bool:
    from ckptcoord.codec.cast import is_cast

    assert tensor.wide is not None, "asked only of those that may be one"
    dtype = tensor.spec.dtype
    return is_cast(tensor.wide[2](), CAST_FROM[dtype], data, dtype)


def _is_alike(one: TensorSpec, other: TensorSpec) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape)


def _check_names(tensors: Sequence[DeltaSource]) -> None:
    names = Counter(tensor.spec.name for tensor in tensors)
    for name, count in names.items():
        if count > 1:
            raise InvalidNameError(kind="tensor", name=name, why="is given twice")


def _bytes_of(tensor: DeltaSource) -> NDArray[np.uint8]:
    if tensor.base is not None and not _is_alike(tensor.base.spec, tensor.spec):
        raise ConfigError(
            field=f"tensor {tensor.spec.name!r}", why="has a base of another shape or dtype"
        )
    data = tensor.read()
    if data.nbytes != tensor.spec.nbytes:
        raise ConfigError(
            field=f"tensor {tensor.spec.name!r}",
            why=f"gives {data.nbytes} bytes, its shape and dtype say {tensor.spec.nbytes}",
            help="It was changed while it was being saved",
        )
    return data


def _mapped(
    pool: ThreadPoolExecutor, work: Callable[[_T], _R], items: Sequence[_T]
) -> Iterator[_R]:
    """The results in order; the first failure ends it, and what has not begun is left out."""
    futures = [pool.submit(work, item) for item in items]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def _stored(name: str, parts: list[bytes]) -> TensorSource:
    spec = TensorSpec(name=name, dtype="U8", shape=(sum(map(len, parts)),))
    return TensorSource(spec=spec, read=lambda: np.frombuffer(b"".join(parts), np.uint8))


def _array(view: memoryview) -> NDArray[np.uint8]:
    return np.frombuffer(view, np.uint8)
