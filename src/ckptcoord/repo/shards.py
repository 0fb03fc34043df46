"""Write shard files: every byte hashed once, on its way to the storage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ckptcoord.codec.digest import blake3_digest
from ckptcoord.codec.tensorfile import (
    TensorEntry,
    TensorSpec,
    encode_header,
    plan_layout,
    shard_digest,
)
from ckptcoord.core.jsonio import JsonValue, dump_json
from ckptcoord.errors import ConfigError, InvalidNameError
from ckptcoord.repo.ahead import Ahead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from ckptcoord.core.digest import Digest
    from ckptcoord.store.base import Store, Writer

__all__ = [
    "TensorSource",
    "TensorSpec",
    "WrittenFile",
    "hf_index",
    "write_file",
    "write_shard",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSource:
    """A tensor to be written.

    Attributes:
        read: gives the bytes, 1-D contiguous uint8. Called once, when the tensor's turn comes; the
            array is let go as soon as it is hashed and written.
    """

    spec: TensorSpec
    read: Callable[[], NDArray[np.uint8]]


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """A durable file; its name is durable once its folder is synced.

    Attributes:
        digest: `shard_digest` of a shard, BLAKE3 of the bytes of any other file.
        entries: a shard's tensors with their digests, in offset order.
    """

    path: str
    size_bytes: int
    digest: Digest
    entries: tuple[TensorEntry, ...] = ()


def write_shard(
    store: Store,
    path: str,
    sources: Iterable[TensorSource],
    *,
    metadata: Mapping[str, str] | None = None,
    threads: int = 2,
) -> WrittenFile:
    """Write tensors as a new safetensors file, and sync it.

    This thread reads the sources while one more, with `threads - 1` cores, hashes their bytes and
    two write them, which is mostly waiting. Of what the sources give, 64 MiB or one larger tensor
    is held at a time. With one thread, all is done on this one.

    Raises:
        StorageError: the storage refused; what was written is to be abandoned.
        ConfigError: a source gives other bytes than its spec says, or the header gets too long.
        InvalidNameError: a name is given twice.
    """
    sources = tuple(sources)
    layout = plan_layout((source.spec for source in sources), metadata)
    named = {source.spec.name: source for source in sources}
    with store.create(path, size_bytes=layout.size_bytes) as writer:
        if threads < 2:
            digests = _write_through(writer, layout.entries, named)
        else:
            digests = _write_ahead(writer, layout.entries, named, threads - 1)
        header = encode_header(layout, digests)
        # The header comes last: a file that was cut off has none, and is no safetensors file.
        writer.write_at(0, header)
        writer.sync()
    return WrittenFile(
        path=path,
        size_bytes=layout.size_bytes,
        digest=shard_digest(header, digests),
        entries=tuple(
            replace(entry, digest=digest)
            for entry, digest in zip(layout.entries, digests, strict=True)
        ),
    )


def write_file(store: Store, path: str, data: bytes) -> WrittenFile:
    """Write any other file, new, and sync it.

    Raises:
        StorageError: the storage refused; what was written is to be abandoned.
    """
    with store.create(path) as writer:
        writer.write_at(0, data)
        writer.sync()
    return WrittenFile(path=path, size_bytes=len(data), digest=blake3_digest(data))


def hf_index(files: Mapping[str, Sequence[str]], total_size: int) -> bytes:
    """The `model.safetensors.index.json` by which transformers finds a sharded model's tensors.

    Args:
        files: file name to the names of its tensors.
        total_size: bytes of all tensors.

    Raises:
        InvalidNameError: a tensor stands in two files.
    """
    weights: dict[str, JsonValue] = {}
    for file, names in files.items():
        for name in names:
            if name in weights:
                raise InvalidNameError(kind="tensor", name=name, why="stands in two files")
            weights[name] = file
    return dump_json({"metadata": {"total_size": total_size}, "weight_map": weights}, indent=2)


def _write_through(
    writer: Writer, entries: Sequence[TensorEntry], named: Mapping[str, TensorSource]
) -> list[Digest]:
    """Hash and write on this thread alone."""
    digests = []
    for entry in entries:
        data = _read(named[entry.spec.name])
        digests.append(blake3_digest(data))
        writer.write_at(entry.begin, data)
        del data  # before the next tensor is read
    return digests


def _write_ahead(
    writer: Writer, entries: Sequence[TensorEntry], named: Mapping[str, TensorSource], hashers: int
) -> list[Digest]:
    """Read on this thread; hash, with `hashers` cores, and write on others."""
    with Ahead(writer, hashers=hashers) as ahead:
        for entry in entries:
            ahead.make_room(entry.spec.nbytes)
            ahead.put(entry.begin, _read(named[entry.spec.name]))
        return ahead.digests()


def _read(source: TensorSource) -> memoryview:
    data = source.read()
    spec = source.spec
    if data.dtype != "uint8" or data.ndim != 1 or not data.flags.c_contiguous:
        raise ConfigError(
            field=f"tensor {spec.name!r}", why="is not read as contiguous, flat uint8"
        )
    if data.nbytes != spec.nbytes:
        raise ConfigError(
            field=f"tensor {spec.name!r}",
            why=f"gives {data.nbytes} bytes, its shape and dtype say {spec.nbytes}",
            help="It was changed while it was being saved",
        )
    return data.data
