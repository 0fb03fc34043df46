"""Files of torch.save, by `torch.load(weights_only=True)`, after a look at what they ask for."""

from __future__ import annotations

import os
import struct
import warnings
import zipfile
import zlib
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ckptcoord.errors import CkptError, CorruptError, FormatError
from ckptcoord.formats.audit import SAVE_AGAIN, Audit
from ckptcoord.formats.folder import RECOPY
from ckptcoord.formats.pickles import MAX_PICKLE_BYTES, read_pickle
from ckptcoord.formats.statecheck import check_state
from ckptcoord.store.files import storage_error

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO

    from ckptcoord.formats.folder import SourceFolder

ZIP_START = b"PK\x03\x04"
_END = b"PK\x05\x06"
_END_BYTES = 22
_MAX_RECORDS = 1_000_000
# What Python's reader trips over. OSError: it seeks to before the file.
_ZIP_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, LookupError),
    *(ValueError, ArithmeticError, RuntimeError),
)
_ROOM_BYTES = 16 << 20


def load_torch(folder: SourceFolder, name: str) -> Any:  # noqa: ANN401 (whatever was saved)
    """What a file of torch.save holds; its tensors are read from the file as they are used.

    Raises:
        FormatError: the file is of another kind, or needs more than plain data.
        CorruptError: it is damaged, or says what it does not hold.
    """
    path = folder.shown(name)
    with folder.opened(name) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
        size_bytes = os.fstat(descriptor).st_size
        _check_file(file, size_bytes, path)
        # The file that was checked, whatever has its name by now.
        here = f"/proc/self/fd/{descriptor}"
        state = _load(lambda: _weights_only(here, mmap=True), path)
    check_state(state, path, limit_bytes=4 * size_bytes + _ROOM_BYTES)
    return state


def load_torch_part(file: IO[bytes], size_bytes: int, path: str, *, meta: bool = False) -> Any:  # noqa: ANN401 (whatever was saved)
    """As `load_torch`, of what stands in the middle of another file; it is read into memory.

    Args:
        file: it.
        size_bytes: its length.
        path: for errors.
        meta: without the tensors' elements, which are not read.
    """
    _check_file(file, size_bytes, path)
    file.seek(0)
    state = _load(lambda: _weights_only(file, device="meta" if meta else "cpu"), path)
    check_state(state, path, limit_bytes=4 * size_bytes + _ROOM_BYTES)
    return state


def _check_file(file: IO[bytes], size_bytes: int, path: str) -> None:
    try:
        head = file.read(4)
        # One end, at the very end: so torch's reader finds the same list of records as Python's.
        file.seek(max(0, size_bytes - _END_BYTES))
        end = file.read()
    except OSError as error:
        raise storage_error("read", path, error) from error
    if head != ZIP_START:
        raise FormatError(
            path=path,
            why="is no file that torch.save has written since torch 1.6",
            help="Load an older one with torch where you trust it, and save it again",
        )
    if not end.startswith(_END):
        raise CorruptError(path=path, why="does not end as torch.save ends files", help=RECOPY)
    try:
        with zipfile.ZipFile(file) as archive:
            top, records = _records(archive, size_bytes, path)
            pickle = read_pickle(archive.read(f"{top}/data.pkl"), path=path)
    except _ZIP_ERRORS as error:
        raise CorruptError(path=path, why=f"is no sound zip file ({error})", help=RECOPY) from error
    Audit(records, path=path).check(pickle)


def _records(archive: zipfile.ZipFile, size_bytes: int, path: str) -> tuple[str, dict[str, int]]:
    """The folder that all records are in, and the size of each storage."""
    infos = archive.infolist()
    top = infos[0].filename.split("/")[0] if infos else ""
    why = _fault(infos, top, size_bytes)
    if why:
        raise CorruptError(path=path, why=why, help=RECOPY)
    sizes = {info.filename.removeprefix(f"{top}/"): info.file_size for info in infos}
    if "constants.pkl" in sizes:
        raise FormatError(
            path=path,
            why="is a TorchScript archive, which is code",
            help="Save the state_dict() of the module that it was made of",
        )
    if "data.pkl" not in sizes:
        raise FormatError(path=path, why="is a zip file, and none of torch.save")
    if sizes["data.pkl"] > MAX_PICKLE_BYTES:
        raise CorruptError(path=path, why="is mostly a pickle", help=RECOPY)
    return top, {
        name.removeprefix("data/"): size for name, size in sizes.items() if name.startswith("data/")
    }


def _fault(infos: list[zipfile.ZipInfo], top: str, size_bytes: int) -> str:
    """Why these are no records of torch.save's; empty where they are."""
    names = [info.filename for info in infos]
    if len(infos) > _MAX_RECORDS or len(set(names)) < len(names):
        return "has records twice, or too many"
    for info in infos:
        parts = info.filename.split("/")
        if parts[0] != top or ".." in parts:
            return f"has the record {info.filename!r:.80}"
        # torch.save does not compress; what unpacks to more than it takes is no storage.
        if info.compress_type or info.file_size != info.compress_size or info.flag_bits & 1:
            return "has packed records"
    if sum(info.file_size for info in infos) > size_bytes:
        return "has records that overlap"
    return ""


def _load(work: Callable[[], Any], path: str) -> Any:  # noqa: ANN401 (whatever was saved)
    try:
        return work()
    except CkptError:
        raise
    except Exception as error:  # torch raises all kinds for a damaged file
        if type(error).__name__ == "UnpicklingError":  # torch advises to run the file's code
            why = "needs more than torch.load(weights_only=True) gives"
            raise FormatError(path=path, why=why, help=SAVE_AGAIN) from None
        why = f"torch cannot read it ({type(error).__name__}: {str(error)[:200]})"
        raise CorruptError(path=path, why=why, help=RECOPY) from error


def _weights_only(file: str | IO[bytes], *, mmap: bool = False, device: str = "cpu") -> Any:  # noqa: ANN401 (whatever was saved)
    # What numpy's names stand for; `audit` has seen that only plain numbers are made of them.
    multiarray = import_module("numpy._core.multiarray")
    kinds = {type(np.dtype(f"{kind}{size}")) for kind, size in _DTYPES}
    names: list[Any] = [np.ndarray, np.dtype, *kinds]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        names.append((multiarray._reconstruct, f"{module}._reconstruct"))  # noqa: SLF001 (theirs)
        names.append((multiarray.scalar, f"{module}.scalar"))
    with torch.serialization.safe_globals(names), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of older files: numpy's, on how they call dtype()
        return torch.load(  # noqa: TID251 (formats/ reads old files, weights_only)
            file, map_location=device, weights_only=True, mmap=mmap
        )


_DTYPES = [
    *[("b", 1), *(("i", size) for size in (1, 2, 4, 8)), *(("u", size) for size in (1, 2, 4, 8))],
    *[("f", 2), ("f", 4), ("f", 8), ("c", 8), ("c", 16)],
]
