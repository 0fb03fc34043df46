"""The tensor file: a safetensors container whose header also holds every tensor's digest.

    8 bytes   length of the JSON, little-endian
    JSON      {"__metadata__": {...}, name: {"dtype", "shape", "data_offsets"}, ...}, then spaces
              up to a multiple of 8
    data      the tensors, one after another, without holes

Source: https://github.com/huggingface/safetensors#format. A tensor whose dtype safetensors does
not know is stored as one that it does; `__metadata__.ckptcoord` says which, and holds the digests:
{"format_version": 1, "digests": {name: "blake3:..."}, "logical": {name: {"dtype", "shape"}}}.

A header is hostile until `parse_header` has returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn, TypeAlias

from ckptcoord.codec.digest import Hasher
from ckptcoord.core.digest import DIGEST_BYTES, Digest
from ckptcoord.core.jsonio import JsonValue, dump_json, parse_json
from ckptcoord.errors import ConfigError, CorruptError, FormatVersionError, InvalidNameError

FORMAT_VERSION = 1
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_PADDING_BYTES = 4096  # some writers align the data to a page
MAX_ENTRIES = 2_000_000
MAX_DIMS = 32
MAX_NAME_CHARS = 4096
MAX_TENSOR_BYTES = 2**63 - 1

_PREFIX_BYTES = 8
_METADATA = "__metadata__"
_OWN = "ckptcoord"
_ROW_KEYS = frozenset({"dtype", "shape", "data_offsets"})
_LOGICAL_KEYS = frozenset({"dtype", "shape"})
_MAX_DEPTH = 8
_NO_DIGEST = Digest(bytes(DIGEST_BYTES))

STORED_BYTES: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
        **dict.fromkeys(("F32", "I32", "U32"), 4),
        **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
        **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
        **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    }
)
"""Bytes an element of the dtypes that stand in a header."""

ITEM_BYTES: Mapping[str, int] = MappingProxyType({**STORED_BYTES, "C128": 16, "C32": 4, "F4": 1})
"""Bytes an element of the dtypes that a trainer may have. F4 is a pair of 4-bit floats in a byte,
and its shape counts pairs."""

ReadAt: TypeAlias = Callable[[int, int], bytes]
"""Exactly `length` bytes from `offset`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor as the trainer has it.

    Raises:
        InvalidNameError: the name is empty, too long, reserved, has unprintable characters or a
            `..` part.
        ConfigError: the dtype is none of ITEM_BYTES, or the shape cannot be.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        check_tensor_name(self.name)
        _check_shape(self.name, self.dtype, self.shape)

    @property
    def nbytes(self) -> int:
        """Its size in bytes, stored or not."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)

    @property
    def stored(self) -> tuple[str, tuple[int, ...]]:
        """The dtype and shape under which it stands in the header."""
        if self.dtype in STORED_BYTES:
            return self.dtype, self.shape
        if self.dtype == "C128" and len(self.shape) < MAX_DIMS:
            return "F64", (*self.shape, 2)  # torch.view_as_real of it
        return "U8", (self.nbytes,)


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


_Row: TypeAlias = tuple[int, int, TensorSpec]
"""Begin and end from the start of the data."""


def check_tensor_name(name: str) -> None:
    """Refuse a name that cannot stand in a header.

    Raises:
        InvalidNameError: says why.
    """
    if not 0 < len(name) <= MAX_NAME_CHARS or name == _METADATA:
        raise InvalidNameError(
            kind="tensor",
            name=name,
            why=f"is reserved or not 1 to {MAX_NAME_CHARS} characters long",
        )
    if not name.isprintable():
        raise InvalidNameError(kind="tensor", name=name, why="has unprintable characters")
    if ".." in name and ".." in name.replace("\\", "/").split("/"):
        raise InvalidNameError(kind="tensor", name=name, why="has a '..' part")


def plan_layout(specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None) -> Layout:
    """Where each tensor goes: larger elements first, so that all stay aligned, then by name.

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
    return Layout(
        entries=tuple(
            TensorEntry(spec=spec, begin=data_start + begin, end=data_start + end)
            for begin, end, spec in rows
        ),
        metadata=own,
        data_start=data_start,
        size_bytes=data_start + (rows[-1][1] if rows else 0),
    )


def encode_header(layout: Layout, digests: Sequence[Digest]) -> bytes:
    """The header of a planned file, `layout.data_start` bytes; `digests` in offset order."""
    start = layout.data_start
    rows = [(entry.begin - start, entry.end - start, entry.spec) for entry in layout.entries]
    return _render(rows, digests, layout.metadata)


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
        document = _object(path, _parse(path, text), "the header")
        metadata = _strings(path, document.pop(_METADATA, {}))
        own = _own(path, metadata.pop(_OWN)) if _OWN in metadata else None
        rows = _rows(path, document, size_bytes - data_start)
        entries = _entries(path, rows, data_start, own)
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


def _check_shape(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    nbytes = ITEM_BYTES.get(dtype, 0)
    if not nbytes:
        raise ConfigError(field=f"tensor {name!r}", why=f"has the unknown dtype {dtype!r:.40}")
    if len(shape) > MAX_DIMS:
        raise ConfigError(
            field=f"tensor {name!r}", why=f"has {len(shape)} dimensions, {MAX_DIMS} at most"
        )
    for size in shape:
        if type(size) is not int or not 0 <= size <= MAX_TENSOR_BYTES:
            raise ConfigError(field=f"tensor {name!r}", why=f"has the dimension {size!r:.40}")
        # A zero elsewhere is no excuse: strides and other readers' products would overflow.
        nbytes *= size or 1
    if nbytes > MAX_TENSOR_BYTES:
        raise ConfigError(field=f"tensor {name!r}", why="is larger than 2**63 bytes")


def _place(specs: Iterable[TensorSpec]) -> list[_Row]:
    rows: list[_Row] = []
    names: set[str] = set()
    end = 0
    for spec in sorted(specs, key=lambda s: (-STORED_BYTES[s.stored[0]], s.name)):
        if spec.name in names:
            raise InvalidNameError(kind="tensor", name=spec.name, why="is given twice")
        names.add(spec.name)
        begin, end = end, end + spec.nbytes
        rows.append((begin, end, spec))
    return sorted(rows, key=_offset_order)


def _offset_order(row: _Row) -> tuple[int, int, str]:
    """Empty tensors share an offset: they come first there, by name."""
    begin, end, spec = row
    return begin, end, spec.name


def _render(rows: Sequence[_Row], digests: Sequence[Digest], metadata: Mapping[str, str]) -> bytes:
    own: dict[str, JsonValue] = {
        "format_version": FORMAT_VERSION,
        "digests": {
            spec.name: str(digest) for (_, _, spec), digest in zip(rows, digests, strict=True)
        },
    }
    logical: dict[str, JsonValue] = {
        spec.name: {"dtype": spec.dtype, "shape": list(spec.shape)}
        for _, _, spec in rows
        if spec.dtype not in STORED_BYTES
    }
    if logical:
        own["logical"] = logical
    # transformers refuses a file without "format".
    notes: dict[str, JsonValue] = {**metadata, "format": "pt", _OWN: dump_json(own).decode("ascii")}
    document: dict[str, JsonValue] = {_METADATA: notes}
    for begin, end, spec in rows:
        dtype, shape = spec.stored
        document[spec.name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = dump_json(document)
    length = -(-len(text) // 8) * 8
    if length > MAX_HEADER_BYTES or len(rows) > MAX_ENTRIES:
        raise ConfigError(
            field="max_shard_size",
            why=f"{len(rows)} tensors in one file need a header of {length} bytes, more than a "
            f"safetensors file may have ({MAX_HEADER_BYTES})",
            help="Choose a smaller max_shard_size",
        )
    return length.to_bytes(_PREFIX_BYTES, "little") + text.ljust(length, b" ")


def _parse(path: str, text: bytes) -> JsonValue:
    body = text.rstrip(b" ")
    if not body.startswith(b"{") or len(text) - len(body) > MAX_PADDING_BYTES:
        _refuse(path, "its header does not begin with '{', or is padded without end")
    return parse_json(body, path=path, max_bytes=MAX_HEADER_BYTES, max_depth=_MAX_DEPTH)


def _rows(path: str, document: dict[str, JsonValue], data_bytes: int) -> list[_Row]:
    """The stored tensors in offset order; they fill the data exactly."""
    if len(document) > MAX_ENTRIES:
        _refuse(path, f"its header has {len(document)} tensors, {MAX_ENTRIES} at most")
    rows = [_row(path, name, value) for name, value in document.items()]
    rows.sort(key=_offset_order)
    position = 0
    for begin, end, spec in rows:
        if begin != position:
            what = "overlaps the one before" if begin < position else "comes after a hole"
            _refuse(path, f"tensor {spec.name!r} {what}")
        position = end
    if position != data_bytes:
        _refuse(path, f"its tensors have {position} bytes and it holds {data_bytes}")
    return rows


def _row(path: str, name: str, value: JsonValue) -> _Row:
    if not isinstance(value, dict) or value.keys() != _ROW_KEYS:
        _refuse(path, f"tensor {name!r:.80} has not just a dtype, a shape and data_offsets")
    spec = _spec(path, name, value)
    if spec.dtype not in STORED_BYTES:
        _refuse(
            path, f"tensor {name!r} has the dtype {spec.dtype}, which safetensors does not know"
        )
    match value["data_offsets"]:
        case [int(begin), int(end)] if type(begin) is type(end) is int:
            pass
        case _:
            _refuse(path, f"the data_offsets of tensor {name!r} are no two whole numbers")
    if begin < 0 or end - begin != spec.nbytes:
        _refuse(path, f"tensor {name!r} is at {begin} to {end}, but has {spec.nbytes} bytes")
    return begin, end, spec


def _spec(path: str, name: str, value: dict[str, JsonValue]) -> TensorSpec:
    dtype, shape = value["dtype"], value["shape"]
    if not isinstance(dtype, str) or not isinstance(shape, list):
        _refuse(path, f"tensor {name!r:.80} has no text as dtype, or no list as shape")
    # TensorSpec finds what is no int, bool among it.
    return TensorSpec(name=name, dtype=dtype, shape=tuple(shape))  # type: ignore[arg-type]


_Own: TypeAlias = tuple[dict[str, Digest], dict[str, TensorSpec]]
"""What ckptcoord has recorded: digests, and the specs that differ from what is stored."""


def _entries(
    path: str, rows: list[_Row], data_start: int, own: _Own | None
) -> tuple[TensorEntry, ...]:
    digests, logical = own or ({}, {})
    names = {spec.name for _, _, spec in rows}
    if own is not None and digests.keys() != names:
        _refuse(path, "its header has not one digest for each tensor")
    if not logical.keys() <= names:
        _refuse(path, "its header has a logical dtype for no tensor")
    entries = []
    for begin, end, stored in rows:
        spec = logical.get(stored.name, stored)
        if spec is not stored and spec.stored != (stored.dtype, stored.shape):
            _refuse(path, f"tensor {spec.name!r} is not stored as {spec.dtype} is")
        entries.append(
            TensorEntry(
                spec=spec,
                begin=data_start + begin,
                end=data_start + end,
                digest=digests.get(spec.name),
            )
        )
    return tuple(entries)


def _own(path: str, text: str) -> _Own:
    # A lone surrogate becomes bytes that parse_json refuses.
    data = text.encode("utf-8", "surrogatepass")
    value = parse_json(data, path=path, max_bytes=MAX_HEADER_BYTES, max_depth=_MAX_DEPTH)
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
    if not isinstance(value, dict) or value.keys() != _LOGICAL_KEYS:
        _refuse(path, f"the logical dtype of {name!r:.80} has not just a dtype and a shape")
    spec = _spec(path, name, value)
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
