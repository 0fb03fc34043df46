"""Files of safetensors as tensors, read from the file as they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ckptcoord.codec.tensorfile import parse_header
from ckptcoord.dist.capture import TORCH_DTYPES
from ckptcoord.errors import CorruptError, FormatError
from ckptcoord.formats.folder import RECOPY

if TYPE_CHECKING:
    import mmap
    from collections.abc import Collection, Mapping

    from ckptcoord.codec.tensorfile import TensorEntry, TensorHeader
    from ckptcoord.formats.folder import SourceFolder


def load_safetensors(
    folder: SourceFolder, name: str, keys: Collection[str] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a file, in its order; of `keys`, those that it has.

    Raises:
        CorruptError: its header breaks the format, or does not fit the file.
        FormatError: this torch lacks a dtype.
    """
    return open_safetensors(folder, name, keys)[0]


def open_safetensors(
    folder: SourceFolder, name: str, keys: Collection[str] | None = None
) -> tuple[dict[str, torch.Tensor], TensorHeader]:
    """As `load_safetensors`, with the header: it may have digests."""
    mapped = folder.mapped(name)
    header = _header(mapped, folder.shown(name))
    tensors = {
        entry.spec.name: _tensor(mapped, entry, folder.shown(name))
        for entry in header.entries
        if keys is None or entry.spec.name in keys
    }
    return tensors, header


def merged(
    parts: Mapping[str, Mapping[str, torch.Tensor]], folder: SourceFolder
) -> dict[str, torch.Tensor]:
    """The tensors of several files as one state.

    Args:
        parts: by file name.
        folder: for errors.

    Raises:
        CorruptError: two files hold a tensor of one name.
    """
    found: dict[str, torch.Tensor] = {}
    homes: dict[str, str] = {}
    for file, tensors in parts.items():
        for name, tensor in tensors.items():
            if name in found:
                raise CorruptError(
                    path=folder.shown(file),
                    why=f"tensor {name!r:.200} stands in {homes[name]}, too",
                    help=RECOPY,
                )
            found[name], homes[name] = tensor, file
    return found


def _header(mapped: mmap.mmap, path: str) -> TensorHeader:
    def read(begin: int, length: int) -> bytes:
        return mapped[begin : begin + length]

    try:
        return parse_header(read, len(mapped), path=path)
    except CorruptError as error:
        raise CorruptError(path=path, why=error.why, help=RECOPY) from error


def _tensor(mapped: mmap.mmap, entry: TensorEntry, path: str) -> torch.Tensor:
    spec = entry.spec
    dtype = TORCH_DTYPES.get(spec.dtype)
    if dtype is None:
        raise FormatError(
            path=path, why=f"has the dtype {spec.dtype}, which torch {torch.__version__} lacks"
        )
    if not spec.nbytes:
        return torch.empty(spec.shape, dtype=dtype)
    flat = torch.frombuffer(mapped, dtype=torch.uint8, count=spec.nbytes, offset=entry.begin)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()  # other tools do not align
    return flat.view(dtype).reshape(spec.shape)
