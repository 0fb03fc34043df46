"""Write delta files: of each tensor, only what is not in the repository already."""

from __future__ import annotations

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

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
    STEPS_DTYPE,
    How,
    Recipe,
    SourceFile,
    part_count,
    render_recipes,
)
from ckptcoord.codec.tensorspec import ITEM_BYTES
from ckptcoord.core.lossy import EXACT, Lossy
from ckptcoord.errors import ConfigError, CorruptError, InvalidNameError
from ckptcoord.repo.deltas import SourceFiles
from ckptcoord.repo.shards import TensorSource, TensorSpec, WrittenFile, write_shard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from ckptcoord.core.digest import Digest
    from ckptcoord.repo.casts import Place
    from ckptcoord.store.base import Store

_T = TypeVar("_T")
_R = TypeVar("_R")


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
        equal: where a tensor of this save is that may have the same bytes: its file, its name
            there, and its bytes.
        wide: where a wider float of the same shape is in this save, which it may be a cast of: the
            file, the name there, and its bytes.
        lossy: what may be given up of it.
    """

    spec: TensorSpec
    read: Callable[[], NDArray[np.uint8]]
    base: Home | None = None
    known: Callable[[NDArray[np.uint8]], Digest | None] = lambda _: None
    equal: Place | None = None
    wide: Place | None = None
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

    A tensor whose bytes are at home somewhere, or are those of another one of this save, is only
    named; one that is the cast of another one is said to be that; of any other, what differs from
    its base is coded. Beside the coded bytes, a part of each thread's tensor and of its base are
    held in memory.

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
        source = self._same(tensor, data, digest)
        if source is not None:
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

    def _same(
        self, tensor: DeltaSource, data: NDArray[np.uint8], digest: Digest
    ) -> tuple[SourceFile, str] | None:
        """Where its bytes are already, or will be with this save."""
        home = self._homes(digest)
        if home is not None and _is_alike(home.spec, tensor.spec):
            return home.file, home.name
        if tensor.equal is not None and np.array_equal(tensor.equal[2](), data):
            file, name, _ = tensor.equal
            return SourceFile(path=f"./{file}"), name
        return None

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
            width = PART_BYTES // ITEM_BYTES[dtype] * ITEM_BYTES[STEPS_DTYPE]
            steps = found.data[number * width : (number + 1) * width]
            return encode(steps, None, dtype=STEPS_DTYPE, level=self._level)
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
