"""The tensor file: a safetensors container whose header also holds every tensor's digest.

    8 bytes   length of the JSON, little-endian
    JSON      {"__metadata__": {...}, name: {"dtype", "shape", "data_offsets"}, ...}, then spaces
              up to a multiple of 8, or to where the data was begun before the JSON was known
    data      the tensors, one after another, without holes

Source: https://github.com/huggingface/safetensors#format. A tensor whose dtype safetensors does
not know is stored as one that it does; `__metadata__.ckptcoord` says which, and holds the digests:
{"format_version": 1, "digests": {name: "blake3:..."}, "logical": {name: {"dtype", "shape"}}}.

A header is hostile until `parse_header` has returned.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

from ckptcoord.codec.digest import Hasher
from ckptcoord.codec.tensorspec import METADATA, STORED_BYTES, TensorSpec, check_tensor_name
from ckptcoord.core.digest import DIGEST_BYTES, Digest
from ckptcoord.core.jsonio import JsonValue, dump_json, parse_json
from ckptcoord.errors import ConfigError, CorruptError, FormatVersionError, InvalidNameError

__all__ = [
    "Layout",
    "TensorEntry",
    "TensorHeader",
    "TensorSpec",
    "check_tensor_name",
    "encode_header",
    "parse_header",
    "plan_layout",
    "room_for_header",
    "shard_digest",
]

FORMAT_VERSION = 1
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_ENTRIES = 2_000_000

_PREFIX_BYTES = 8
_SECTOR_BYTES, _PAGE_BYTES = 512, 4096
_LARGE_FILE_BYTES = 1 << 20
_OWN = "ckptcoord"
_MAX_DEPTH = 8
_NO_DIGEST = Digest(bytes(DIGEST_BYTES))

ReadAt: TypeAlias = Callable[[int, int], bytes]
"""Exactly `length` bytes from `offset`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where a tensor's bytes are in its file; `digest` is None where none is recorded."""

    spec: TensorSpec
    begin: int
    end: int
    digest: Digest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A file before it is written; `entries` in offset order, without digests."""

    entries: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    data_start: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    """A header that was found sound.

    Attributes:
        entries: in offset order.
        metadata: what stands in `__metadata__`, without what this module keeps there.
        data_start: size of the header in bytes.
        raw: the header as it stands in the file, with its length and padding.
    """

    entries: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    data_start: int
    raw: bytes


_Row: TypeAlias = tuple[int, int, str, TensorSpec]
"""Begin and end from the start of the data, name, spec. Rows sort in offset order: empty tensors,
which share an offset, by name, and before the one that fills it."""


@contextmanager
def _without_gc() -> Iterator[None]:
    """Nothing here makes cycles, and looking for them doubles the time for a long header."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def plan_layout(specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None) -> Layout:
    """Where each tensor goes: larger elements first, so that all stay aligned, then by name.

    Of equal elements, tensors of whole sectors come first, and in a large file the data begin with
    a page: so nearly all of it can go to a device from where it is in memory.

    The header's size is known before any digest is, since a digest's text has one length: the
    data can be written, and hashed meanwhile, before the header.

    Raises:
        InvalidNameError: a name is given twice.
        ConfigError: `metadata` has a key that this module keeps, or the header would be too long.
    """
    own = dict(metadata or {})
    for key in ("format", _OWN):
        if key in own:
            raise ConfigError(field=f"metadata[{key!r}]", why="is reserved")
    rows = _place(specs)
    data_start = len(_render(rows, [_NO_DIGEST] * len(rows), own))
    if rows and rows[-1][1] >= _LARGE_FILE_BYTES:
        data_start = -(-data_start // _PAGE_BYTES) * _PAGE_BYTES
    return Layout(
        entries=tuple(
            TensorEntry(spec=spec, begin=data_start + begin, end=data_start + end)
            for begin, end, _, spec in rows
        ),
        metadata=own,
        data_start=data_start,
        size_bytes=data_start + (rows[-1][1] if rows else 0),
    )


def room_for_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> int:
    """Bytes that the header will not exceed, in whatever order the tensors are put.

    Args:
        specs: of the tensors' names, each of the greatest size that it may turn out to have.
        metadata: as long as it may turn out to be.

    Raises:
        ConfigError: the header may become too long.
    """
    specs = list(specs)
    end = sum(spec.nbytes for spec in specs)
    rows = [(end, end, spec.name, spec) for spec in specs]
    return len(_render(rows, [_NO_DIGEST] * len(rows), metadata))


def encode_header(layout: Layout, digests: Sequence[Digest]) -> bytes:
    """The header of a planned file, `layout.data_start` bytes; `digests` in offset order."""
    start = layout.data_start
    rows = [(e.begin - start, e.end - start, e.spec.name, e.spec) for e in layout.entries]
    header = _render(rows, digests, layout.metadata, room_bytes=start)
    if len(header) != start:  # not an assertion: the header would be written over the data
        raise AssertionError(f"a header of {len(header)} bytes has room for {start}")
    return header


def parse_header(read: ReadAt, size_bytes: int, *, path: str) -> TensorHeader:
    """Read and check a header. No more than it is read, and never past `size_bytes`.

    Args:
        read: gives bytes of the file.
        size_bytes: the file's size.
        path: for errors.

    Raises:
        CorruptError: the header breaks the format in any way, or the file is longer or shorter
            than it says.
        FormatVersionError: a newer ckptcoord wrote it.
    """
    if size_bytes < _PREFIX_BYTES:
        _refuse(path, f"its {size_bytes} bytes are too few for a safetensors file")
    prefix = read(0, _PREFIX_BYTES)
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, size_bytes - _PREFIX_BYTES):
        _refuse(path, f"its header claims {length} bytes, which it cannot have")
    text = read(_PREFIX_BYTES, length)
    data_start = _PREFIX_BYTES + length
    try:
        entries, metadata = _contents(path, text, data_start, size_bytes)
    except (InvalidNameError, ConfigError) as error:
        raise CorruptError(path=path, why=f"its header is not sound: {error.what}") from error
    return TensorHeader(
        entries=entries, metadata=metadata, data_start=data_start, raw=prefix + text
    )


def shard_digest(header: bytes, digests: Iterable[Digest]) -> Digest:
    """The digest of a whole shard file: BLAKE3 of its header, then its tensors' raw digests.

    Args:
        header: with its length and padding (`TensorHeader.raw`).
        digests: in offset order.
    """
    hasher = Hasher()
    hasher.update(header)
    hasher.update(b"".join(digest.value for digest in digests))
    return hasher.digest()


@_without_gc()
def _place(specs: Iterable[TensorSpec]) -> list[_Row]:
    rows: list[_Row] = []
    names: set[str] = set()
    end = 0
    for spec in sorted(specs, key=_rank):
        if spec.name in names:
            raise InvalidNameError(kind="tensor", name=spec.name, why="is given twice")
        names.add(spec.name)
        begin, end = end, end + spec.nbytes
        rows.append((begin, end, spec.name, spec))
    rows.sort()
    return rows


def _rank(spec: TensorSpec) -> tuple[int, bool, str]:
    return -STORED_BYTES[spec.stored[0]], spec.nbytes % _SECTOR_BYTES != 0, spec.name


@_without_gc()
def _render(
    rows: Sequence[_Row],
    digests: Sequence[Digest],
    metadata: Mapping[str, str],
    *,
    room_bytes: int = 0,
) -> bytes:
    own: dict[str, JsonValue] = {
        "format_version": FORMAT_VERSION,
        "digests": {
            name: str(digest) for (_, _, name, _), digest in zip(rows, digests, strict=True)
        },
    }
    logical: dict[str, JsonValue] = {
        name: {"dtype": spec.dtype, "shape": list(spec.shape)}
        for _, _, name, spec in rows
        if spec.dtype not in STORED_BYTES
    }
    if logical:
        own["logical"] = logical
    # transformers refuses a file without "format".
    notes: dict[str, JsonValue] = {**metadata, "format": "pt", _OWN: dump_json(own).decode("ascii")}
    document: dict[str, JsonValue] = {METADATA: notes}
    for begin, end, name, spec in rows:
        dtype, shape = spec.stored
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = dump_json(document)
    length = max(-(-len(text) // 8) * 8, room_bytes - _PREFIX_BYTES)
    if length > MAX_HEADER_BYTES or len(rows) > MAX_ENTRIES:
        raise ConfigError(
            field="max_shard_size",
            why=f"{len(rows)} tensors in one file need a header of {length} bytes, more than a "
            f"safetensors file may have ({MAX_HEADER_BYTES})",
            help="Choose a smaller max_shard_size",
        )
    return length.to_bytes(_PREFIX_BYTES, "little") + text.ljust(length, b" ")


@_without_gc()
def _contents(
    path: str, text: bytes, data_start: int, size_bytes: int
) -> tuple[tuple[TensorEntry, ...], dict[str, str]]:
    """Entries and metadata of the header's JSON."""
    document = _object(path, _parse(path, text), "the header")
    metadata = _strings(path, document.pop(METADATA, {}))
    own = _own(path, metadata.pop(_OWN)) if _OWN in metadata else None
    rows = _rows(path, document, size_bytes - data_start)
    return _entries(path, rows, data_start, own), metadata


def _parse(path: str, text: bytes) -> JsonValue:
    body = text.rstrip(b" ")
    if not body.startswith(b"{"):
        _refuse(path, "its header does not begin with '{'")
    return parse_json(body, path=path, max_bytes=MAX_HEADER_BYTES, max_depth=_MAX_DEPTH)


def _rows(path: str, document: dict[str, JsonValue], data_bytes: int) -> list[_Row]:
    """The stored tensors in offset order; they fill the data exactly."""
    if len(document) > MAX_ENTRIES:
        _refuse(path, f"its header has {len(document)} tensors, {MAX_ENTRIES} at most")
    rows = [_row(path, name, value) for name, value in document.items()]
    rows.sort()
    position = 0  # so a negative offset overlaps
    for begin, end, name, _ in rows:
        if begin != position:
            what = "overlaps the one before" if begin < position else "comes after a hole"
            _refuse(path, f"tensor {name!r} {what}")
        position = end
    if position != data_bytes:
        _refuse(path, f"its tensors have {position} bytes and it holds {data_bytes}")
    return rows


def _row(path: str, name: str, value: JsonValue) -> _Row:
    spec, offsets = _spec(path, name, value, "data_offsets")
    if spec.dtype not in STORED_BYTES:
        _refuse(path, f"tensor {name!r} has the dtype {spec.dtype}, unknown to safetensors")
    # No class patterns here: a header may have 100,000s of rows.
    if type(offsets) is not list or len(offsets) != 2:
        _refuse(path, f"the data_offsets of tensor {name!r} are no pair")
    begin, end = offsets
    if type(begin) is not int or type(end) is not int:
        _refuse(path, f"the data_offsets of tensor {name!r} are no two whole numbers")
    if end - begin != spec.nbytes:
        _refuse(path, f"tensor {name!r} is at {begin} to {end}, but has {spec.nbytes} bytes")
    return begin, end, name, spec


def _spec(path: str, name: str, value: JsonValue, more: str = "") -> tuple[TensorSpec, JsonValue]:
    """A spec, and the value of the one field beside it."""
    if type(value) is not dict or len(value) != 2 + bool(more):
        _refuse(path, f"tensor {name!r:.80} is no object of {2 + bool(more)} fields")
    try:
        dtype, shape, rest = value["dtype"], value["shape"], value[more] if more else None
    except KeyError as error:
        raise CorruptError(path=path, why=f"tensor {name!r:.80} has no field {error}") from error
    if type(dtype) is not str or type(shape) is not list:
        _refuse(path, f"tensor {name!r:.80} has no text as dtype, or no list as shape")
    # TensorSpec refuses sizes that are no int.
    return TensorSpec(name=name, dtype=dtype, shape=tuple(shape)), rest  # type: ignore[arg-type]


_Own: TypeAlias = tuple[dict[str, Digest], dict[str, TensorSpec]]
"""What ckptcoord has recorded: digests, and the specs that differ from what is stored."""


def _entries(
    path: str, rows: list[_Row], data_start: int, own: _Own | None
) -> tuple[TensorEntry, ...]:
    digests, logical = own or ({}, {})
    if own is not None and digests.keys() != {name for _, _, name, _ in rows}:
        _refuse(path, "its header has not one digest for each tensor")
    if not logical.keys() <= digests.keys():
        _refuse(path, "its header has a logical dtype for no tensor")
    entries = []
    for begin, end, name, stored in rows:
        spec = logical.get(name, stored)
        if spec is not stored and spec.stored != (stored.dtype, stored.shape):
            _refuse(path, f"tensor {name!r} is not stored as {spec.dtype} is")
        entries.append(
            TensorEntry(
                spec=spec,
                begin=data_start + begin,
                end=data_start + end,
                digest=digests.get(name),
            )
        )
    return tuple(entries)


def _own(path: str, text: str) -> _Own:
    value = parse_json(text.encode(), path=path, max_bytes=MAX_HEADER_BYTES, max_depth=_MAX_DEPTH)
    document = _object(path, value, "__metadata__.ckptcoord")
    version = document.pop("format_version", None)
    if type(version) is not int or version < 1:
        _refuse(path, "its header has no format version")
    if version > FORMAT_VERSION:
        raise FormatVersionError(path=path, found=version, supported=FORMAT_VERSION)
    digests = _strings(path, document.pop("digests", None))
    logical = _object(path, document.pop("logical", {}), "the logical dtypes")
    if document:
        _refuse(path, f"its header has the unknown fields {sorted(document)!r:.80}")
    return (
        {name: Digest.parse(digest) for name, digest in digests.items()},
        {name: _logical_spec(path, name, value) for name, value in logical.items()},
    )


def _logical_spec(path: str, name: str, value: JsonValue) -> TensorSpec:
    spec, _ = _spec(path, name, value)
    if spec.dtype in STORED_BYTES:
        _refuse(path, f"the logical dtype of {name!r} is {spec.dtype}, which needs none")
    return spec


def _object(path: str, value: JsonValue, what: str) -> dict[str, JsonValue]:
    if not isinstance(value, dict):
        _refuse(path, f"{what} is no JSON object")
    return value


def _strings(path: str, value: JsonValue) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, text in _object(path, value, "metadata").items():
        if not isinstance(text, str):
            _refuse(path, f"the metadata {key!r:.80} is no text")
        found[key] = text
    return found


def _refuse(path: str, why: str) -> NoReturn:
    raise CorruptError(path=path, why=why)
