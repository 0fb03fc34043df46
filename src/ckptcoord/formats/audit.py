"""What a file of torch.save asks for, checked before torch reads it.

`torch.load(weights_only=True)` runs no code of the file, but believes its numbers: sizes of
storages and tensors, lengths of byte strings. Here each of its calls is one of few kinds, and its
numbers fit what the file holds, so that nothing is allocated that the file does not hold. numpy's
arrays are let in for the same reason: plain numbers, as many bytes as their shape says.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ckptcoord.codec.tensorspec import MAX_DIMS
from ckptcoord.errors import CorruptError, FormatError
from ckptcoord.formats.folder import RECOPY
from ckptcoord.formats.pickles import Call, Global, Persistent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ckptcoord.formats.pickles import Pickle

_STORAGES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("ByteStorage", "CharStorage", "BoolStorage", "UntypedStorage"), 1),
    "ComplexDoubleStorage": 16,
}
_NUMBERS = re.compile(r"[<>|=]?([biufc])(1|2|4|8|16)")
_MAX_SIZE = 2**62
_PROTOCOL = 2  # torch.save's, unless told otherwise
SAVE_AGAIN = (
    "Where you trust the file, load it with torch and the code that made it, and save state dicts "
    "of tensors and plain numbers alone: torch.save({'model': model.state_dict(), 'optimizer': "
    "optimizer.state_dict(), 'step': step}, path)"
)


class Audit:
    """One file's.

    Args:
        records: the size in bytes of each storage that the file holds, by key.
        path: for errors.
    """

    def __init__(self, records: Mapping[str, int], *, path: str) -> None:
        self._records, self._path = records, path
        self._storages: dict[int, tuple[int, int]] = {}  # bytes an element, bytes

    def check(self, pickle: Pickle) -> None:
        """Refuse what torch should not read.

        Raises:
            FormatError: the file needs objects that are no plain data; names them.
            CorruptError: its numbers are not those of what it holds.
        """
        self._refuse_objects(pickle)
        if pickle.protocol != _PROTOCOL:
            raise FormatError(
                path=self._path,
                why=f"is pickled by protocol {pickle.protocol}, and torch.load(weights_only=True) "
                f"reads {_PROTOCOL} alone",
                help="Load it and save it again without pickle_protocol",
            )
        if pickle.built:
            self._corrupt("sets the state of what it did not make")
        try:
            for one in pickle.persistent:
                self._storages[id(one)] = self._storage(one.id)
            for call in pickle.calls:
                _CALLS[_plain_name(call.name)](self, call)
        except (TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise self._error(f"asks for what no checkpoint has ({error})") from error

    def _refuse_objects(self, pickle: Pickle) -> None:
        names = {_plain_name(call.name) or "what is no name" for call in pickle.calls}
        strange = sorted(names - _CALLS.keys())
        if strange:
            more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
            shown = ", ".join(name[:80] for name in strange[:3])
            raise FormatError(
                path=self._path,
                why=f"needs {shown}{more}, which only the code that made the file could give",
                help=SAVE_AGAIN,
            )

    # --- storages and tensors ---

    def _storage(self, saved: object) -> tuple[int, int]:
        if not isinstance(saved, tuple) or len(saved) != 5 or _text(saved[0]) != "storage":
            self._corrupt("names data that is no storage")
        kind, key, numel = saved[1], saved[2], saved[4]
        name = kind.name.rpartition(".")[2] if isinstance(kind, Global) else ""
        if name not in _STORAGES:
            raise FormatError(path=self._path, why=f"has a {name or kind!r:.80}", help=SAVE_AGAIN)
        nbytes = _whole(numel) * _STORAGES[name]
        if type(key) is not str or self._records.get(key) != nbytes:
            self._corrupt(f"says {nbytes} bytes of storage {key!r:.40}, and does not hold them")
        return _STORAGES[name], nbytes

    def tensor(self, call: Call) -> None:
        """`_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])`."""
        self._fits(call, self._storages[id(_kind(call.args[0], Persistent))][0])

    def typed_tensor(self, call: Call) -> None:
        """`_rebuild_tensor_v3`, the same with a dtype behind the hooks."""
        dtype = getattr(torch, _kind(call.args[6], Global).name.removeprefix("torch."), None)
        self._fits(call, _kind(dtype, torch.dtype).itemsize)

    def _fits(self, call: Call, item_bytes: int) -> None:
        _, nbytes = self._storages[id(_kind(call.args[0], Persistent))]
        size, stride = _sizes(call.args[2]), _sizes(call.args[3])
        if len(size) != len(stride) or not 6 <= len(call.args) <= 8:
            self._corrupt("has a tensor without a stride for each dimension")
        _empty(call.args[5])
        last = _whole(call.args[1]) + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if math.prod(size) and (last + 1) * item_bytes > nbytes:
            self._corrupt(f"has a tensor of shape {list(size)} in a storage of {nbytes} bytes")

    def parameter(self, call: Call) -> None:
        """`_rebuild_parameter(tensor, requires_grad, hooks)`."""
        tensor, _, hooks = call.args
        if _plain_name(_kind(tensor, Call).name) not in _TENSORS:
            self._corrupt("has a parameter of no tensor")
        _empty(hooks)

    # --- everything else ---

    def ordered(self, call: Call) -> None:
        """`OrderedDict()`, whose items come later; of a module, with `_metadata`."""
        if call.args not in ((), ([],)):
            self._corrupt("has an OrderedDict of what is no item")
        if call.state is not None and (
            not isinstance(call.state, dict) or not call.state.keys() <= {"_metadata"}
        ):
            self._corrupt("sets attributes of an OrderedDict")

    def few(self, call: Call) -> None:
        """What takes a few texts, numbers or one collection that is there already."""
        if len(call.args) > 2 or call.state is not None:
            self._corrupt(f"calls {call.name} with {len(call.args)} arguments")
        for arg in call.args:
            if not isinstance(arg, str | float | list | tuple | dict | set | Global):
                self._corrupt(f"makes a {call.name} of a {type(arg).__name__}")

    def size(self, call: Call) -> None:
        """`torch.Size((2, 3))`."""
        (sizes,) = call.args
        _sizes(sizes)

    def device(self, call: Call) -> None:
        """`torch.device("cuda", 0)`."""
        kind, *index = call.args
        if type(kind) is not str or len(kind) > 20 or len(index) > 1:
            self._corrupt("names no device")
        for one in index:
            _whole(one)

    def raw(self, call: Call) -> None:
        """`bytearray(b"...")`, and never a number, which would be a length."""
        for arg in call.args:
            if not isinstance(arg, bytes) and _plain_name(_kind(arg, Call).name) != _ENCODE:
                self._corrupt("makes bytes of what are none")

    def dtype(self, call: Call) -> None:
        """`numpy.dtype("<f4", False, True)`, of numbers."""
        self._item_bytes(call)
        if len(call.args) != 3:
            self._corrupt("has a numpy dtype of parts")
        if call.state is not None:
            state: Any = call.state
            version, order, *rest = state
            if version != 3 or order not in ("<", ">", "|", "=") or rest != _PLAIN_DTYPE:
                self._corrupt("has a numpy dtype of parts")

    def array(self, call: Call) -> None:
        """`_reconstruct(numpy.ndarray, (0,), b"b")` and its state."""
        kind, shape, _ = call.args
        if kind != Global("numpy.ndarray") or shape != (0,):
            self._corrupt("makes an array of no numbers")
        state: Any = call.state
        version, shape, dtype, fortran, data = state
        if version != 1 or type(fortran) is not bool:
            self._corrupt("has a numpy array of an unknown kind")
        need = math.prod(_sizes(shape)) * self._item_bytes(dtype)
        if len(_bytes_of(data)) != need:
            self._corrupt(f"has a numpy array of shape {list(shape)} that lacks bytes")

    def scalar(self, call: Call) -> None:
        """`scalar(dtype, b"...")`."""
        dtype, data = call.args
        if len(_bytes_of(data)) != self._item_bytes(dtype) or call.state is not None:
            self._corrupt("has a numpy number that lacks bytes")

    def _item_bytes(self, dtype: object) -> int:
        call = _kind(dtype, Call)
        if call.name != _DTYPE:
            self._corrupt("has numpy numbers of no dtype")
        match = _NUMBERS.fullmatch(str(_text(call.args[0])))
        if match is None:
            raise FormatError(
                path=self._path,
                why=f"has a numpy array of dtype {call.args[0]!r:.40}, which are no numbers",
                help=SAVE_AGAIN,
            )
        return int(match[2])

    def _corrupt(self, why: str) -> NoReturn:
        raise self._error(why)

    def _error(self, why: str) -> CorruptError:
        return CorruptError(path=self._path, why=why, help=RECOPY)


def _plain_name(name: str) -> str:
    """As Python 3 and numpy 2 call it."""
    name = _OLD_NAMES.get(name, name)
    return name.replace("numpy._core.", "numpy.core.")


def _kind(value: object, kind: type) -> Any:  # noqa: ANN401 (of that kind)
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} in the place of a {kind.__name__}")
    return value


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value < _MAX_SIZE:
        raise ValueError(f"{value!r:.40} is no size")
    return value


def _sizes(value: object) -> tuple[int, ...]:
    if isinstance(value, Call) and value.name == "torch.Size":
        (value,) = value.args
    if not isinstance(value, tuple) or len(value) > MAX_DIMS:
        raise TypeError("sizes that are no tuple")
    return tuple(map(_whole, value))


def _empty(hooks: object) -> None:
    if _plain_name(_kind(hooks, Call).name) != "collections.OrderedDict" or hooks.items:  # type: ignore[attr-defined]
        raise ValueError("a tensor with hooks")


def _text(value: object) -> object:
    """Protocol 2 has bytes for texts that Python 2 wrote."""
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value


def _bytes_of(value: object) -> bytes:
    if isinstance(value, Call) and value.name == _ENCODE and len(value.args) == 2:
        text, code = value.args
        if type(text) is str and code == "latin1":
            return text.encode("latin1")
    if isinstance(value, bytes):
        return value
    raise TypeError("bytes that are none")


def _encode(audit: Audit, call: Call) -> None:
    _bytes_of(call)


_ENCODE, _DTYPE = "_codecs.encode", "numpy.dtype"
_PLAIN_DTYPE = [None, None, None, -1, -1, 0]
_OLD_NAMES = {
    "__builtin__.set": "builtins.set",
    "__builtin__.bytearray": "builtins.bytearray",
    "__builtin__.complex": "builtins.complex",
}
_TENSORS = frozenset({"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"})
_CALLS: dict[str, Callable[[Audit, Call], None]] = {
    "torch._utils._rebuild_tensor_v2": Audit.tensor,
    "torch._utils._rebuild_tensor_v3": Audit.typed_tensor,
    "torch._utils._rebuild_parameter": Audit.parameter,
    "collections.OrderedDict": Audit.ordered,
    "collections.Counter": Audit.few,
    "builtins.set": Audit.few,
    "builtins.complex": Audit.few,
    "torch.serialization._get_layout": Audit.few,
    "builtins.bytearray": Audit.raw,
    "torch.Size": Audit.size,
    "torch.device": Audit.device,
    _ENCODE: _encode,
    _DTYPE: Audit.dtype,
    "numpy.core.multiarray._reconstruct": Audit.array,
    "numpy.core.multiarray.scalar": Audit.scalar,
}
