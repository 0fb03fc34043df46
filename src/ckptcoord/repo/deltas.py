"""Read delta files: tensors made again out of what is in the repository already.

A tensor is made part by part (`PART_BYTES`): the source's part is read into the destination, and
the coded part is decoded over it there. A chain of deltas goes through the same part one after
another, so that no second copy of a tensor is ever needed.

A load checks what tensors are made out of, and decodes them once (docs/adr/0007-a-load-decodes-
once.md): `DeltaReader.inputs` says what that is.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Self

import numpy as np

from ckptcoord.codec.bounded import add_steps
from ckptcoord.codec.delta import HEADER, DecodeError, FrameKind, check_frames, decode, frames
from ckptcoord.codec.digest import Hasher
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
from ckptcoord.codec.tensorfile import TensorEntry
from ckptcoord.codec.tensorspec import ITEM_BYTES
from ckptcoord.errors import ConfigError, CorruptError
from ckptcoord.repo.readers import Input, ShardReader, TensorReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from numpy.typing import NDArray

    from ckptcoord.codec.bounded import GivenUp
    from ckptcoord.codec.tensorfile import TensorHeader
    from ckptcoord.core.digest import Digest
    from ckptcoord.repo.readers import Out, Proof
    from ckptcoord.store.base import Store

_ROOM_BYTES = 256 << 10  # rooms are multiples of it: parts take a little more or less
_MAX_LINKS = 100  # of a chain; what is longer goes in a circle
_NOTHING_CODED = 4 * HEADER.size  # bytes of a part that has no more than a few frames' headers


class SourceFiles:
    """The files that tensors are made out of, each opened when first needed; closes them all.

    Args:
        store: where they are.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._open: dict[tuple[str, Digest | None], TensorReader] = {}
        self._vouched: dict[str, SourceFile] = {}
        self._rooms: deque[NDArray[np.uint8]] = deque()  # any thread takes and gives at its end

    def vouch(self, path: str, *, size_bytes: int, digest: Digest) -> None:
        """Say what a file must be, which a delta beside it names without its digest."""
        file = SourceFile(path=path, size_bytes=size_bytes, digest=digest)
        self._vouched.setdefault(path, file)

    @contextmanager
    def room(self, nbytes: int) -> Iterator[memoryview]:
        """Memory that is the caller's until the block ends, from a block before where it does."""
        try:
            held = self._rooms.pop()
        except IndexError:  # asking first would be a race
            held = np.empty(0, np.uint8)
        if held.nbytes < nbytes:
            held = np.empty(-(-nbytes // _ROOM_BYTES) * _ROOM_BYTES, np.uint8)
        yield held.data[:nbytes]
        self._rooms.append(held)

    def open(self, file: SourceFile, folder: str = "") -> TensorReader:
        """The reader of a file, one for all who ask.

        Args:
            file: which.
            folder: of the delta that names it, which `./` stands for.

        Raises:
            CorruptError: it is not what it should be.
        """
        path = file.path if file.folder else f"{folder}/{file.path.removeprefix('./')}"
        stated_by = "its manifest" if file.digest is None else "the recipe"
        if file.digest is None:
            file = self._vouched.get(path, file)
        key = path, file.digest
        with self._lock:
            if key not in self._open:
                self._open[key] = open_tensors(
                    self._store,
                    path,
                    expected=file.digest,
                    size_bytes=file.size_bytes or None,
                    stated_by=stated_by,
                    sources=self,
                )
            return self._open[key]

    def close(self) -> None:
        """Close them all; what is asked for afterwards is opened again."""
        readers, self._open = self._open, {}
        for reader in readers.values():
            reader.close()

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

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
    stated_by: str = "its manifest",
    sources: SourceFiles | None = None,
) -> TensorReader:
    """Open a shard or a delta file, whichever it is; arguments and errors as for ShardReader.

    `sources` opens what a delta file's tensors are made out of, and is closed by whoever made it;
    without it the reader has its own.
    """
    shard = ShardReader(store, path, expected=expected, size_bytes=size_bytes, stated_by=stated_by)
    if DELTA_KEY not in shard.header.metadata:
        return shard
    files = SourceFiles(store) if sources is None else sources
    try:
        reader = DeltaReader(shard, files, closes=files if sources is None else None)
    except BaseException:
        shard.close()
        raise
    if expected is not None:
        files.vouch(path, size_bytes=size_bytes or 0, digest=expected)
    return reader


class DeltaReader(TensorReader):
    """A delta file; its tensors read as if they stood there whole.

    Args:
        shard: the file itself; closed with this.
        sources: opens what its tensors are made out of.
        closes: of those, what is closed with this.

    Raises:
        CorruptError: its recipes are not sound as a whole; each is checked when it is used.
        FormatVersionError: a newer ckptcoord wrote them.
    """

    part_bytes = PART_BYTES
    slow = True

    def __init__(
        self, shard: ShardReader, sources: SourceFiles, *, closes: SourceFiles | None = None
    ) -> None:
        super().__init__()
        self.path = shard.path
        self.authentic = shard.authentic
        self._closes = closes
        self._folder = shard.path.rpartition("/")[0]
        self._shard = shard
        self._sources = sources
        self._finite: set[str] = set()
        text = shard.header.metadata[DELTA_KEY]
        self.recipes = parse_recipes(text, shard.header, path=shard.path)
        self._makers: dict[str, _Maker] = {}

    @cached_property
    def header(self) -> TensorHeader:
        """The file's, with all tensors that it has recipes of in the place of what is stored."""
        made = tuple(self._maker(name).made for name in self.recipes)
        return replace(self._shard.header, entries=made)

    def find(self, name: str) -> TensorEntry | None:
        """The tensor of that name; only its own recipe is looked at."""
        return self._maker(name).made if name in self.recipes else None

    def read_range(
        self, entry: TensorEntry, offset: int, out: memoryview, *, proven: bool = False
    ) -> None:
        """Make some parts of a tensor again; the last of them may be cut short by its end only."""
        maker = self._maker(entry.spec.name)
        self._check_chain(entry.spec.name)
        end = offset + out.nbytes
        if offset % PART_BYTES or (end % PART_BYTES and end != entry.spec.nbytes):
            raise ConfigError(field="offset", why=f"{offset} to {end} are no whole parts")
        for start in range(offset, end, PART_BYTES):
            part = out[start - offset : min(start + PART_BYTES, end) - offset]
            self._make(maker, start, part, proven=proven)

    def apply(self, entry: TensorEntry, offset: int, out: memoryview) -> None:
        """As `read_range` for one part, where `out` holds its source's bytes already.

        Not for a cast, whose source has other bytes.
        """
        maker = self._maker(entry.spec.name)
        assert maker.recipe.how is not How.CAST, "a cast is made out of a wider tensor"
        self._apply(maker, offset // PART_BYTES, out)

    def inputs(self, entry: TensorEntry, *, proves: bool = True) -> list[Input]:
        """The coded bytes of a tensor and of all that it is made out of, and the tensor at the end.

        Where the header of any of them is vouched for by nobody, they prove nothing: it is the
        tensor itself then, which is made to be checked.
        """
        self._check_chain(entry.spec.name)
        found: list[Input] = []
        reader: TensorReader = self
        there = entry
        while reader.authentic:
            if not isinstance(reader, DeltaReader):
                return found + reader.inputs(there, proves=not found)
            name = there.spec.name
            if reader.recipes[name].is_stored:
                key, check = (reader.path, name), reader.check_stored
                found.append(Input(key=key, entry=there, check=check))
            origin = reader.origin(name)
            if origin is None:
                return found
            reader, there = origin
        return super().inputs(entry, proves=proves)

    def given_up(self) -> dict[str, GivenUp]:
        """As for any, from the recipes."""
        found = ((name, recipe.given_up) for name, recipe in self.recipes.items())
        return {name: one for name, one in found if one is not None}

    def home(self, entry: TensorEntry) -> tuple[TensorReader, TensorEntry]:
        """Of a tensor that is one of a plain shard by the word of headers alone, that one.

        Only what names its digest is followed: the ranks of a node, who take one another's proofs,
        then all come to the same.
        """
        reader: TensorReader = self
        there = entry
        self._check_chain(entry.spec.name)
        while reader.authentic and isinstance(reader, DeltaReader):
            recipe = reader.recipes[there.spec.name]
            if recipe.how is not How.SAME or recipe.source is None or not recipe.source[0].folder:
                return self, entry
            origin = reader.origin(there.spec.name)
            assert origin is not None, "it has a source"
            reader, there = origin
        return (reader, there) if reader.authentic else (self, entry)

    def examine(
        self, entry: TensorEntry, seen: Callable[[memoryview], object] | None = None
    ) -> None:
        """As for any; bytes that stand elsewhere are checked there.

        Where nobody sees the parts, they are held to the recipe's fingerprints, too.

        Raises:
            CorruptError: those are wrong, which a load into live tensors would refuse.
        """
        reader, there = self.home(entry)
        if reader is not self:
            reader.examine(there, seen)
            return
        prints = self.recipes[entry.spec.name].prints
        if seen is not None or not prints:
            super().examine(entry, seen)
        elif super().check(entry) != prints:
            raise CorruptError(
                path=self.path,
                why=f"tensor {entry.spec.name!r:.80} is sound, and the fingerprints (xxh3) in its "
                "recipe are wrong: a load into live tensors refuses it",
                tensor=entry.spec.name,
            )

    def fill(self, entry: TensorEntry, out: Out, proof: Proof) -> None:
        """As for any; bytes that stand elsewhere are read there, and need no second digest."""
        reader, there = self.home(entry)
        if reader is self:
            super().fill(entry, out, proof)
        else:
            reader.fill(there, out, proof)

    def changed(self, entry: TensorEntry) -> CorruptError:
        """As for any; or it was never what its recipe says."""
        return CorruptError(
            path=self.path,
            why=f"tensor {entry.spec.name!r} is not decoded to what its fingerprints say: what it "
            "is made out of changed between the check and the read, or it was coded wrongly, or "
            "the fingerprints are wrong",
            tensor=entry.spec.name,
        )

    def check_stored(self, entry: TensorEntry) -> Proof:
        """Check what the file holds of a tensor, decoding nothing; what will prove the result.

        Raises:
            DigestMismatchError: the bytes are not those that were written.
            CorruptError: they are, and are no frames of this tensor.
        """
        maker = self._maker(entry.spec.name)
        hasher = Hasher()
        wrong: DecodeError | None = None
        for number in range(len(maker.recipe.parts)):
            with self._coded(maker, number) as coded:
                hasher.update(coded)
                try:
                    maker.check_part(number, coded)
                except DecodeError as error:
                    wrong = wrong or error
        super().check_digest(maker.coded, hasher.digest())
        if wrong is not None:
            raise self._malformed(maker, wrong) from wrong
        return maker.recipe.prints or None

    def check_digest(self, entry: TensorEntry, found: Digest) -> None:
        """As for any; what a tensor is made out of is blamed where that is what is damaged."""
        if found != entry.digest:
            for one in self.inputs(entry):
                if one.key != (self.path, entry.spec.name):
                    self._check_source(entry.spec.name, one)
        super().check_digest(entry, found)

    def origin(self, name: str) -> tuple[TensorReader, TensorEntry] | None:
        """What a tensor is made out of, and its reader; None where nothing is needed.

        Raises:
            CorruptError: it is not there, not what it was, or of another shape or dtype; or it
                should be the same and has another digest.
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
        if recipe.how is How.SAME and entry.digest is not None:
            super().check_digest(self._maker(name).made, entry.digest)
        return reader, entry

    def is_unchanged(self, name: str, number: int) -> bool:
        """Whether a part of a tensor is its source's, as far as headers alone say.

        Raises:
            CorruptError: what is coded of it is no frames.
        """
        maker, recipe = self._maker(name), self.recipes[name]
        if recipe.how is not How.CODED or recipe.source is None:
            return recipe.how is How.SAME
        if recipe.parts[number] > _NOTHING_CODED:
            return False
        with self._coded(maker, number) as coded:
            try:
                return all(frame.kind is FrameKind.UNCHANGED for frame in frames(coded))
            except DecodeError as error:
                raise self._malformed(maker, error) from error

    def close(self) -> None:
        """Let go of the file, and of what it alone has opened."""
        self._shard.close()
        if self._closes is not None:
            self._closes.close()

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
            tensor=name,
        )

    def _check_source(self, name: str, source: Input) -> None:
        try:
            source.check(source.entry)
        except CorruptError as error:
            raise self._unfit(name, source.key[1], error.what) from error

    def _maker(self, name: str) -> _Maker:
        found = self._makers.get(name)
        if found is None:
            stored = self._shard.find(name)
            found = _Maker(self.recipes[name], stored, self._shard.header)
            self._makers[name] = found
        return found

    def _make(self, maker: _Maker, offset: int, out: memoryview, *, proven: bool) -> None:
        recipe = maker.recipe
        origin = self.origin(recipe.spec.name)
        if origin is not None and recipe.how is How.CAST:
            self._cast(*origin, offset, out, recipe.spec.dtype)
        elif origin is not None:
            reader, entry = origin
            reader.read_range(entry, offset, out, proven=proven)
        self._apply(maker, offset // PART_BYTES, out, proven=proven)

    def _apply(self, maker: _Maker, number: int, out: memoryview, *, proven: bool = False) -> None:
        """Turn a part of the source into one of the tensor."""
        recipe = maker.recipe
        if recipe.how is How.CODED:
            self._decode(maker, number, _array(out), proven=proven)
        elif recipe.how is How.UPDATE:
            with self._sources.room(maker.decoded_bytes(number)) as room:
                steps = _array(room)
                self._decode(maker, number, steps, proven=proven)
                add_steps(steps.view(np.uint32), _array(out), recipe.spec.dtype, recipe.step)

    def _cast(
        self, reader: TensorReader, entry: TensorEntry, offset: int, out: memoryview, dtype: str
    ) -> None:
        """Fill `out` with a wider tensor's values from an offset in the narrow one's bytes."""
        from ckptcoord.codec.cast import cast  # late: few need it

        ratio = ITEM_BYTES[entry.spec.dtype] // ITEM_BYTES[dtype]
        with self._sources.room(out.nbytes * ratio) as wide:
            reader.read_range(entry, offset * ratio, wide)
            cast(_array(wide), entry.spec.dtype, _array(out), dtype)

    def _decode(self, maker: _Maker, number: int, out: NDArray[np.uint8], *, proven: bool) -> None:
        with self._coded(maker, number) as coded:
            try:
                decode(coded, out, dtype=maker.coded_dtype, proven=proven)
            except DecodeError as error:
                raise self._malformed(maker, error) from error

    @contextmanager
    def _coded(self, maker: _Maker, number: int) -> Iterator[memoryview]:
        """The coded bytes of a part, until the block ends."""
        with self._sources.room(maker.recipe.parts[number]) as room:
            self._shard.read_range(maker.coded, maker.offsets[number], room)
            yield room

    def _malformed(self, maker: _Maker, error: DecodeError) -> CorruptError:
        name = maker.recipe.spec.name
        return CorruptError(path=self.path, why=f"tensor {name!r}: {error}", tensor=name)

    def _unfit(self, name: str, there: str, why: str) -> CorruptError:
        return CorruptError(
            path=self.path,
            why=f"tensor {name!r:.80} is made out of {there!r:.80}: {why}",
            tensor=name,
        )


class _Maker:
    """A recipe, and where its parts are.

    Attributes:
        made: the tensor, as a reader sees it, at the place of what is stored of it.
        offsets: of the parts in what is stored.
    """

    def __init__(self, recipe: Recipe, stored: TensorEntry | None, header: TensorHeader) -> None:
        self.recipe = recipe
        self._stored = stored
        begin, end = header.data_start, header.data_start
        if stored is not None:
            begin, end = stored.begin, stored.end
        self.made = TensorEntry(spec=recipe.spec, begin=begin, end=end, digest=recipe.digest)
        self.offsets = [0, *accumulate(recipe.parts)]

    @property
    def coded(self) -> TensorEntry:
        """What is stored of it; without parts there is none."""
        assert self._stored is not None, "a coded tensor has its entry"
        return self._stored

    @property
    def coded_dtype(self) -> str:
        """Of what its parts are decoded to."""
        return STEPS_DTYPE if self.recipe.how is How.UPDATE else self.recipe.spec.dtype

    def decoded_bytes(self, number: int) -> int:
        """How many bytes one of its parts is decoded to."""
        spec = self.recipe.spec
        nbytes = min(PART_BYTES, spec.nbytes - number * PART_BYTES)
        if self.recipe.how is How.UPDATE:
            return nbytes // ITEM_BYTES[spec.dtype] * ITEM_BYTES[STEPS_DTYPE]
        return nbytes

    def check_part(self, number: int, coded: memoryview) -> None:
        """Check what is coded of a part without decoding it.

        Raises:
            DecodeError: it is no frames of it.
        """
        recipe = self.recipe
        has_base = recipe.how is How.CODED and recipe.source is not None
        nbytes = self.decoded_bytes(number)
        check_frames(coded, nbytes, dtype=self.coded_dtype, has_base=has_base)


def _array(view: memoryview) -> NDArray[np.uint8]:
    return np.frombuffer(view, np.uint8)
