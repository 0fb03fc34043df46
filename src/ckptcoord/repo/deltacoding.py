"""Tensors of delta files: what each is made out of, and what is coded of it, on several threads."""

from __future__ import annotations

import math
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ckptcoord.codec.bounded import (
    FLOAT_DTYPES,
    UPDATE_DTYPES,
    add_steps,
    distance,
    keep_signs,
    round_mantissa,
    step_of,
    to_steps,
)
from ckptcoord.codec.digest import blake3_digest, xxh3
from ckptcoord.codec.recipe import (
    CAST_FROM,
    PART_BYTES,
    STEPS_DTYPE,
    How,
    Recipe,
    SourceFile,
    part_count,
)
from ckptcoord.codec.tensorspec import ITEM_BYTES, TensorSpec
from ckptcoord.core.lossy import EXACT, Lossy
from ckptcoord.errors import BaseUnreadableError, CkptError, ConfigError, CorruptError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import ThreadPoolExecutor

    from numpy.typing import NDArray

    from ckptcoord.codec.tensorfile import TensorEntry
    from ckptcoord.core.digest import Digest
    from ckptcoord.repo.casts import Place
    from ckptcoord.repo.deltas import SourceFiles
    from ckptcoord.repo.readers import TensorReader

AHEAD_BYTES = 64 << 20
"""Of tensors that are coded at a time, unless a single one is larger."""
LEAST_PRINTED_BYTES = 64 << 10
"""Of a tensor whose fingerprints pay for their place in the header."""
_T = TypeVar("_T")
_BATCH_BYTES = 1 << 20
_MOST_IN_BATCH = 64


@dataclass(slots=True, kw_only=True)
class Home:
    """Where a tensor's bytes are already.

    Attributes:
        sound: whether this process wrote these, or has read and checked them.
    """

    file: SourceFile
    name: str
    spec: TensorSpec
    digest: Digest
    sound: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaSource:
    """A tensor to be written into a delta file.

    Attributes:
        spec: what it is.
        read: gives its bytes, 1-D contiguous uint8; called once.
        base: what its delta is against; None where there is nothing.
        known: gives the digest of its bytes where that can be told without hashing them all anew.
        equal: where tensors of this save are that may have the same bytes: their file, their name
            there, and their bytes.
        wide: where wider floats of the same shape are in this save, one of which it may be a cast
            of: likewise.
        lossy: what may be given up of it.
        held: gives the base's bytes where this process still has them and needs them no more: they
            are written over.
    """

    spec: TensorSpec
    read: Callable[[], NDArray[np.uint8]]
    base: Home | None = None
    known: Callable[[NDArray[np.uint8]], Digest | None] = lambda _: None
    equal: Sequence[Place] = ()
    wide: Sequence[Place] = ()
    lossy: Lossy = EXACT
    held: Callable[[], NDArray[np.uint8] | None] = lambda: None


@dataclass(frozen=True, slots=True)
class Job:
    """A tensor, its bytes, and its recipe: without its parts, or exact where it may be lossy."""

    tensor: DeltaSource
    data: NDArray[np.uint8]
    recipe: Recipe

    @property
    def is_lossy(self) -> bool:
        """Whether something may be given up of it."""
        spec = self.tensor.spec
        return (
            self.recipe.how is How.CODED
            and self.tensor.lossy != EXACT
            and spec.dtype in FLOAT_DTYPES
            and bool(spec.shape and spec.nbytes)
        )


@dataclass(frozen=True, slots=True)
class Coded:
    """What is written of a tensor; `made` is what a reader takes for it, where that is another."""

    recipe: Recipe
    parts: tuple[bytes, ...] = ()
    made: NDArray[np.uint8] | None = None

    def entry(self) -> tuple[TensorSpec, memoryview]:
        """What is stored in the file."""
        data = memoryview(self.parts[0] if len(self.parts) == 1 else b"".join(self.parts))
        return TensorSpec(name=self.recipe.spec.name, dtype="U8", shape=(data.nbytes,)), data


class _UnderWay:
    """Batches that are being coded, and how many bytes of tensors they are."""

    __slots__ = ("_held_bytes", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[tuple[int, Callable[[], list[Coded]]]] = deque()
        self._held_bytes = 0

    def has_room(self, nbytes: int) -> bool:
        """Whether so many more may be coded."""
        return not self.waiting or self._held_bytes + nbytes <= AHEAD_BYTES

    def add(self, nbytes: int, wait: Callable[[], list[Coded]]) -> None:
        """One has begun; `wait` gives what comes of it."""
        self.waiting.append((nbytes, wait))
        self._held_bytes += nbytes

    def first(self) -> Callable[[], list[Coded]]:
        """What gives the result of the one that began first; it is no longer counted."""
        nbytes, wait = self.waiting.popleft()
        self._held_bytes -= nbytes
        return wait


class Encoder:
    """Recipes and coded bytes of several tensors, made in a pool's threads."""

    def __init__(
        self,
        files: SourceFiles,
        homes: Callable[[Digest], Home | None],
        level: str,
        pool: ThreadPoolExecutor,
    ) -> None:
        from ckptcoord.codec.delta import Level  # late: numba takes a second

        self._files = files
        self._homes = homes
        self._level = Level(level)
        self._pool = pool

    def recognise(self, tensors: Iterable[DeltaSource]) -> Callable[[], list[Job]]:
        """Begin to find out what is stored already and what is to be coded; what waits for it."""
        work = lambda batch: [self._recognise(tensor) for tensor in batch]  # noqa: E731
        batches = _batches(tensors, lambda tensor: tensor.spec.nbytes)
        futures = [self._pool.submit(work, batch) for batch in batches]
        return lambda: [job for future in futures for job in future.result()]

    def run(self, jobs: Iterable[Job], *, begun_all: Callable[[], None]) -> Iterator[Coded]:
        """Begin to code what is to be coded; what comes of it, in order.

        A few tensors are under way at a time, from the call on. `begun_all` is called when the last
        is.
        """
        batches = deque(_batches(jobs, _to_code))
        under_way = _UnderWay()
        self._fill(batches, under_way, begun_all)
        return self._drain(batches, under_way, begun_all)

    def _fill(
        self,
        batches: deque[list[Job]],
        under_way: _UnderWay,
        begun_all: Callable[[], None],
    ) -> None:
        """Begin as many batches as there is room for."""
        while batches and under_way.has_room(nbytes := sum(map(_to_code, batches[0]))):
            under_way.add(nbytes, self._begin(batches.popleft()))
        if not batches:
            begun_all()

    def _drain(
        self,
        batches: deque[list[Job]],
        under_way: _UnderWay,
        begun_all: Callable[[], None],
    ) -> Iterator[Coded]:
        while under_way.waiting:
            yield from under_way.first()()
            if batches:
                self._fill(batches, under_way, begun_all)

    def _begin(self, batch: list[Job]) -> Callable[[], list[Coded]]:
        """Start to code some tensors; what waits for the end of that."""
        job = batch[0]
        if len(batch) == 1 and job.recipe.is_stored and not job.is_lossy:  # it may be large
            numbers = range(part_count(job.data.nbytes))
            parts = [self._pool.submit(self._part, job.tensor, job.data, at) for at in numbers]
            return lambda: [_coded(job.recipe, [part.result() for part in parts])]
        return self._pool.submit(lambda: [self._code(one) for one in batch]).result

    def _code(self, job: Job) -> Coded:
        """Code a tensor on this thread."""
        if job.is_lossy:
            return self._code_nearly(job)
        if not job.recipe.is_stored:
            return Coded(job.recipe)
        return self._exact(job.recipe, job.tensor, job.data, None)

    def _recognise(self, tensor: DeltaSource) -> Job:
        spec, data = tensor.spec, _bytes_of(tensor)
        digest = tensor.known(data) or blake3_digest(data.data)
        recipe = Recipe(spec=spec, digest=digest, how=How.CODED, source=_against(tensor))
        source = self._same(tensor, data, digest)
        if source is not None:
            recipe = replace(recipe, how=How.SAME, source=source)
        elif (wide := _cast_of(tensor, data)) is not None:
            file, name, _ = wide
            recipe = replace(recipe, how=How.CAST, source=(SourceFile(path=f"./{file}"), name))
        elif tensor.base is not None and not tensor.base.sound:
            self._check(tensor.base)
        return Job(tensor, data, recipe)

    def _same(
        self, tensor: DeltaSource, data: NDArray[np.uint8], digest: Digest
    ) -> tuple[SourceFile, str] | None:
        """Where its bytes are already, or will be with this save."""
        home = self._homes(digest)
        if home is not None and _is_alike(home.spec, tensor.spec):
            return home.file, home.name
        for file, name, read in tensor.equal:
            if np.array_equal(read(), data):
                return SourceFile(path=f"./{file}"), name
        return None

    def _code_nearly(self, job: Job) -> Coded:
        """Code a tensor with something given up of it, where that can be."""
        tensor, rule, base = job.tensor, job.tensor.lossy, job.tensor.held()
        if base is None and (rule.change_threshold or rule.update_fraction):
            base = self._base_part(tensor, 0, job.data.nbytes)
        if base is not None:
            found = _left_out(job, base) or self._in_steps(job, base)
            if found is not None:
                return found
        if rule.mantissa_bits is not None:
            return self._rounded(job, rule.mantissa_bits, base)
        return self._exact(job.recipe, tensor, job.data, base)

    def _in_steps(self, job: Job, base: NDArray[np.uint8]) -> Coded | None:
        """Code a change in whole steps; `base` becomes what readers take for the tensor."""
        spec, fraction = job.tensor.spec, job.tensor.lossy.update_fraction
        if not fraction or spec.dtype not in UPDATE_DTYPES:
            return None
        step = step_of(job.data, base, spec.dtype, fraction)
        if not step:
            return None
        steps = to_steps(job.data, base, spec.dtype, step)
        if not keep_signs(steps, job.data, base, spec.dtype, step):
            return None
        add_steps(steps, base, spec.dtype, step)
        given_up = distance(job.data, base, spec.dtype)
        if not math.isfinite(given_up.relative_l2):  # a tensor of nearly nothing
            return self._exact(job.recipe, job.tensor, job.data, None)
        recipe = replace(
            job.recipe,
            how=How.UPDATE,
            digest=blake3_digest(base.data),
            step=step,
            given_up=given_up,
        )
        parts = zip(self._step_parts(steps, spec.dtype), _prints(base), strict=True)
        return _coded(recipe, parts, made=base)

    def _rounded(self, job: Job, bits: int, base: NDArray[np.uint8] | None) -> Coded:
        """Code a tensor with fewer bits of mantissa."""
        tensor, spec = job.tensor, job.tensor.spec
        rounded = round_mantissa(job.data, spec.dtype, bits)
        given_up = distance(job.data, rounded, spec.dtype)
        if not given_up.max_abs:
            return self._exact(job.recipe, tensor, job.data, base)
        recipe = replace(job.recipe, digest=blake3_digest(rounded.data), given_up=given_up)
        if tensor.base is not None and recipe.digest == tensor.base.digest:
            return Coded(replace(recipe, how=How.SAME), made=rounded)
        return self._exact(recipe, tensor, rounded, base, made=rounded)

    def _exact(
        self,
        recipe: Recipe,
        tensor: DeltaSource,
        data: NDArray[np.uint8],
        base: NDArray[np.uint8] | None,
        *,
        made: NDArray[np.uint8] | None = None,
    ) -> Coded:
        """Code all parts on this thread."""
        numbers = range(part_count(data.nbytes))
        return _coded(recipe, [self._part(tensor, data, at, base) for at in numbers], made=made)

    def _step_parts(self, steps: NDArray[np.uint32], dtype: str) -> Iterator[bytes]:
        from ckptcoord.codec.delta import encode  # late: numba takes a second

        count = PART_BYTES // ITEM_BYTES[dtype]
        for start in range(0, steps.size, count):
            part = steps[start : start + count].view(np.uint8)
            yield encode(part, None, dtype=STEPS_DTYPE, level=self._level)

    def _part(
        self,
        tensor: DeltaSource,
        data: NDArray[np.uint8],
        number: int,
        base: NDArray[np.uint8] | None = None,
    ) -> tuple[bytes, bytes]:
        """A part, coded, and its fingerprint."""
        from ckptcoord.codec.delta import encode  # late: numba takes a second

        start = number * PART_BYTES
        new = data[start : start + PART_BYTES]
        if base is None:
            held = self._base_part(tensor, start, new.nbytes)
        else:
            held = base[start : start + PART_BYTES]
        return encode(new, held, dtype=tensor.spec.dtype, level=self._level), xxh3(new.data)

    def _base_part(self, tensor: DeltaSource, start: int, nbytes: int) -> NDArray[np.uint8] | None:
        """Some bytes of the base; None where there is none."""
        base = tensor.base
        if base is None:
            return None
        out = np.empty(nbytes, np.uint8)
        with self._reading(base) as (reader, entry):
            reader.read_range(entry, start, out.data)
        return out

    def _check(self, base: Home) -> None:
        """Read all of what is coded against: of what is coded against damage, nothing can be made.

        Raises:
            BaseUnreadableError: it cannot be read, or is not what was written.
        """
        with self._reading(base) as (reader, entry):
            reader.examine(entry)
        base.sound = True

    @contextmanager
    def _reading(self, base: Home) -> Iterator[tuple[TensorReader, TensorEntry]]:
        try:
            reader = self._files.open(base.file)
            entry = reader.find(base.name)
            if entry is None or not _is_alike(entry.spec, base.spec):
                raise CorruptError(
                    path=reader.path, why=f"does not hold {base.name!r} as its header said"
                )
            yield reader, entry
        except CkptError as error:
            raise BaseUnreadableError(folder=base.file.folder, why=error.what) from error


def _coded(
    recipe: Recipe,
    parts: Iterable[tuple[bytes, bytes]],
    *,
    made: NDArray[np.uint8] | None = None,
) -> Coded:
    coded, prints = [], []
    for one, its_print in parts:
        coded.append(one)
        prints.append(its_print)
    printed = recipe.spec.nbytes >= LEAST_PRINTED_BYTES
    recipe = replace(
        recipe, parts=tuple(map(len, coded)), prints=b"".join(prints) if printed else b""
    )
    return Coded(recipe, tuple(coded), made)


def _prints(data: NDArray[np.uint8]) -> Iterator[bytes]:
    """The fingerprint of each part."""
    for start in range(0, data.size, PART_BYTES):
        yield xxh3(data[start : start + PART_BYTES].data)


def _left_out(job: Job, base: NDArray[np.uint8]) -> Coded | None:
    """A tensor that has changed too little to be written: it is its base."""
    tensor, threshold = job.tensor, job.tensor.lossy.change_threshold
    if not threshold or tensor.base is None:
        return None
    given_up = distance(job.data, base, tensor.spec.dtype)
    if not given_up.relative_l2 < threshold:  # a NaN is no small change
        return None
    recipe = replace(job.recipe, how=How.SAME, digest=tensor.base.digest, given_up=given_up)
    return Coded(recipe, made=base)


def _against(tensor: DeltaSource) -> tuple[SourceFile, str] | None:
    base = tensor.base
    return None if base is None or not tensor.spec.nbytes else (base.file, base.name)


def _cast_of(tensor: DeltaSource, data: NDArray[np.uint8]) -> Place | None:
    """The tensor that one is a cast of, if it is."""
    from ckptcoord.codec.cast import is_cast  # late: few need it

    dtype = tensor.spec.dtype
    casts = (one for one in tensor.wide if is_cast(one[2](), CAST_FROM[dtype], data, dtype))
    return next(casts, None)


def _is_alike(one: TensorSpec, other: TensorSpec) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape)


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


def _to_code(job: Job) -> int:
    """Bytes that are to be coded."""
    return job.data.nbytes if job.recipe.is_stored else 0


def _batches(items: Iterable[_T], nbytes: Callable[[_T], int]) -> list[list[_T]]:
    """The items in order, small ones together: a thread's next task costs what coding some does."""
    found: list[list[_T]] = []
    room = 0
    for item in items:
        size = nbytes(item)
        if not found or size > room:
            found.append([])
            room = _BATCH_BYTES
        found[-1].append(item)
        room -= size + _BATCH_BYTES // _MOST_IN_BATCH
    return found
