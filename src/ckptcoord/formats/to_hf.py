"""A model as a folder that transformers opens: safetensors, their index, config and tokenizer."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

from ckptcoord.codec.digest import blake3_digest
from ckptcoord.core.leaf import LeafKind
from ckptcoord.dist.capture import tensor_bytes
from ckptcoord.errors import ConfigError, CorruptError, DigestMismatchError
from ckptcoord.formats.beside import read_beside
from ckptcoord.formats.casting import dtype_name
from ckptcoord.formats.hf import CONFIG
from ckptcoord.formats.spill import scratch
from ckptcoord.repo.export import write_model_folder
from ckptcoord.repo.readers import ShardReader
from ckptcoord.repo.shards import TensorSource, write_file
from ckptcoord.store.files import storage_errors
from ckptcoord.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from ckptcoord.core.digest import Digest
    from ckptcoord.formats.beside import Beside
    from ckptcoord.formats.exporting import Export
    from ckptcoord.formats.whole import WholeCheckpoint, WholeState, WholeTensor
    from ckptcoord.store.base import Store

_BESIDE = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
_MAX_BESIDE_BYTES = 256 << 20
_DTYPE_KEYS = ("dtype", "torch_dtype")


def write_hf(
    source: WholeCheckpoint,
    wanted: Export,
    whole: WholeState,
    beside: Beside,
    folder: Path,
    advance: Callable[[int], None],
) -> tuple[str, ...]:
    """Write into an empty folder and read it back; a tensor is held at a time.

    Returns:
        The paths of what is no tensor, and was left out.

    Raises:
        ConfigError: `config_from` has no config.json.
        CorruptError: the checkpoint is damaged, or what was read back is not what was written.
        StorageError: the storage refused, also to read from `config_from`.
    """
    with storage_errors("read", str(wanted.config_from or "")):
        given = dict(_given(wanted))
    if beside.config:
        given[CONFIG] = _config(beside.config, wanted.dtype)
    digests: dict[str, Digest] = {}
    sources = [
        TensorSource(spec=one.spec, read=partial(_read, source, one, digests, advance))
        for one in whole.tensors.values()
        if one.saved.kind is LeafKind.TENSOR
    ]
    inner = folder / "model"
    write_model_folder(inner, sources, max_shard_size=wanted.max_shard_size)
    for path in sorted(inner.iterdir()):
        path.replace(folder / path.name)
    inner.rmdir()
    store = LocalStore(folder)
    for name, data in given.items():
        write_file(store, name, data)
    for name, data in read_beside(source, beside):
        write_file(store, name, data)
    _check(store, digests, advance)
    return whole.beside_tensors


def _read(
    source: WholeCheckpoint,
    tensor: WholeTensor,
    digests: dict[str, Digest],
    advance: Callable[[int], None],
) -> NDArray[np.uint8]:
    out = scratch(tensor.spec)
    source.read(tensor, out)
    data = tensor_bytes(out)
    digests[tensor.spec.name] = blake3_digest(data.data)
    advance(tensor.spec.nbytes)
    return data


def _check(store: Store, digests: dict[str, Digest], advance: Callable[[int], None]) -> None:
    """Every tensor is in one of the files, as it was when it was read from the checkpoint."""
    left = dict(digests)
    for entry in store.list(""):
        if not entry.name.endswith(".safetensors"):
            continue
        with ShardReader(store, entry.name, expected=None) as shard:
            for tensor in shard.header.entries:
                shard.check(tensor)  # its bytes against its own header
                expected = left.pop(tensor.spec.name, None)
                if tensor.digest != expected:
                    raise DigestMismatchError(
                        path=entry.name,
                        tensor=tensor.spec.name,
                        expected=str(expected),
                        found=str(tensor.digest),
                    )
                advance(tensor.spec.nbytes)
    if left:
        raise CorruptError(path=store.url, why=f"tensor {min(left)!r} is in none of the files")


def _given(wanted: Export) -> Iterator[tuple[str, bytes]]:
    """The other files from `config_from`, by name."""
    config_from, dtype = wanted.config_from, wanted.dtype
    if config_from is None:
        return
    if not (config_from / CONFIG).is_file():
        raise ConfigError(field="--config-from", why=f"{config_from} has no {CONFIG}")
    yield CONFIG, _config(_small(config_from / CONFIG), dtype)
    for name in sorted(_BESIDE):
        if (config_from / name).is_file():
            yield name, _small(config_from / name)


def _small(path: Path) -> bytes:
    with path.open("rb") as file:  # links are followed: a hub's cache is made of them
        data = file.read(_MAX_BESIDE_BYTES + 1)
    if len(data) > _MAX_BESIDE_BYTES:
        raise ConfigError(
            field="--config-from", why=f"{path} has over {_MAX_BESIDE_BYTES >> 20} MiB"
        )
    return data


def _config(data: bytes, dtype: str | None) -> bytes:
    """The config, with the dtype that the weights have now: transformers loads them as it says."""
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(field="--config-from", why=f"{CONFIG} is no JSON") from error
    if not isinstance(config, dict):
        raise ConfigError(field="--config-from", why=f"{CONFIG} is no JSON object")
    known = [key for key in _DTYPE_KEYS if key in config]
    if dtype is None or not known:
        return data
    config |= dict.fromkeys(known, dtype_name(dtype))
    return json.dumps(config, indent=2).encode() + b"\n"
