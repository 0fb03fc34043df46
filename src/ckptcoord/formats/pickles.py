"""A pickle read as plain data: what it would call is recorded, and nothing is called.

Opcodes: https://docs.python.org/3/library/pickletools.html. The one that calls (REDUCE and its
kin) makes a `Call` here, a reference to a module makes a `Global`, so that whoever reads the file
can see what it wants before anything in it is believed.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptcoord.errors import CorruptError
from ckptcoord.formats.folder import RECOPY

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_PICKLE_BYTES = 256 << 20
_KEY_DEPTH = 3


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that the pickle names, as `module.name`."""

    name: str


@dataclass(frozen=True, slots=True)
class Persistent:
    """What the pickle says is stored elsewhere."""

    id: object


@dataclass(slots=True, eq=False)
class Call:
    """A call that the pickle asks for.

    Attributes:
        what: the function or class; anything but a Global makes no sense.
        args: its arguments.
        state: what is to be set on the result, once there is a BUILD.
        items: what is put into the result by key or appended.
        new: the class's __new__ is meant.
    """

    what: object
    args: tuple[Any, ...]
    state: object = None
    items: list[Any] = field(default_factory=list)
    new: bool = False

    @property
    def name(self) -> str:
        """Of what is called; empty where it is no name."""
        return self.what.name if isinstance(self.what, Global) else ""


@dataclass(slots=True, kw_only=True)
class Pickle:
    """A pickle's value, and all that it wants.

    Attributes:
        value: lists, dicts, tuples, scalars, and the above.
        calls: in the order in which they would be made.
        persistent: likewise.
        built: the targets of BUILDs that are no Call.
        protocol: its own; 0 where it does not say.
    """

    value: object = None
    calls: list[Call] = field(default_factory=list)
    persistent: list[Persistent] = field(default_factory=list)
    built: int = 0
    protocol: int = 0


def read_pickle(data: bytes | memoryview, *, path: str) -> Pickle:
    """What a pickle holds, of any protocol. Takes memory in proportion to its bytes.

    Raises:
        CorruptError: it is none, or ends early, or has opcodes that no checkpoint needs.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise CorruptError(path=path, why=f"is a pickle of {len(data)} bytes", help=RECOPY)
    machine = _Machine()
    try:
        for opcode, arg, _ in pickletools.genops(bytes(data)):
            machine.step(opcode.name, arg)
    # The machine is built for sound input; what is not trips over one of these.
    except (
        *(ValueError, TypeError, LookupError, AttributeError),
        *(ArithmeticError, RecursionError, AssertionError, Warning),
    ) as error:
        raise CorruptError(path=path, why=f"is no sound pickle ({error})", help=RECOPY) from error
    if not machine.stopped:
        raise CorruptError(path=path, why="is a pickle that ends early", help=RECOPY)
    return machine.result


class _Machine:
    """The stack machine. Each method is an opcode, or several that do alike."""

    def __init__(self) -> None:
        self.result = Pickle()
        self.stopped = False
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, arg: Any) -> None:  # noqa: ANN401 (an opcode's argument)
        """Do one opcode.

        Raises:
            ValueError: it is none that a checkpoint needs.
        """
        if name in _PUSHED:
            self._stack.append(arg)
        elif name in _MADE:
            self._stack.append(_MADE[name]())
        elif name != "FRAME":
            method = _METHODS.get(name)
            if method is None:
                raise ValueError(f"the opcode {name}")
            method(self, arg)

    def proto(self, number: int) -> None:
        self.result.protocol = number

    def mark(self, _: object) -> None:
        self._marks.append(len(self._stack))

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def tuple_of(self, count: int | None) -> None:
        if count is None:
            self._stack.append(tuple(self._since_mark()))
            return
        items = tuple(self._pop() for _ in range(count))[::-1]
        self._stack.append(items)

    def list_of(self, _: object) -> None:
        self._stack.append(self._since_mark())

    def dict_of(self, _: object) -> None:
        items = self._since_mark()
        self._stack.append({})
        self._set(items)

    def frozenset_of(self, _: object) -> None:
        self._stack.append(frozenset(map(_key, self._since_mark())))

    def append(self, _: object) -> None:
        self._extend([self._pop()])

    def appends(self, _: object) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Call):
            target.items += items
        elif isinstance(target, set):
            target.update(map(_key, items))
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise TypeError("items are added to what holds none")

    def setitem(self, _: object) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def setitems(self, _: object) -> None:
        self._set(self._since_mark())

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        pairs = zip(map(_key, items[::2]), items[1::2], strict=True)
        if isinstance(target, Call):
            target.items += pairs
        elif isinstance(target, dict):
            target.update(pairs)
        else:
            raise TypeError("a key is set in what has none")

    def pop(self, _: object) -> None:
        self._pop()

    def pop_mark(self, _: object) -> None:
        self._since_mark()

    def dup(self, _: object) -> None:
        self._stack.append(self._stack[-1])

    def put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def memoize(self, _: object) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def name(self, text: str) -> None:
        module, _, attribute = text.partition(" ")
        self._stack.append(Global(f"{module}.{attribute}"))

    def stack_name(self, _: object) -> None:
        attribute, module = self._pop(), self._pop()
        self._stack.append(Global(f"{module}.{attribute}"))

    def call(self, _: object) -> None:
        args, what = self._pop(), self._pop()
        self._call(what, args)

    def new(self, _: object) -> None:
        args, what = self._pop(), self._pop()
        self._call(what, args, new=True)

    def new_with_names(self, _: object) -> None:
        names, args, what = self._pop(), self._pop(), self._pop()
        if names:
            raise ValueError("arguments by name")
        self._call(what, args, new=True)

    def _call(self, what: object, args: object, *, new: bool = False) -> None:
        if not isinstance(args, tuple):
            raise TypeError("arguments that are no tuple")
        call = Call(what, args, new=new)
        self.result.calls.append(call)
        self._stack.append(call)

    def build(self, _: object) -> None:
        state = self._pop()
        if isinstance(self._stack[-1], Call):
            self._stack[-1].state = state
        else:
            self.result.built += 1

    def elsewhere(self, _: object) -> None:
        one = Persistent(self._pop())
        self.result.persistent.append(one)
        self._stack.append(one)

    def stop(self, _: object) -> None:
        self.result.value = self._pop()
        self.stopped = True

    def _pop(self) -> Any:  # noqa: ANN401 (whatever is on the stack)
        if self._marks and len(self._stack) <= self._marks[-1]:
            raise IndexError("the stack is empty")
        return self._stack.pop()


def _key(value: object, depth: int = _KEY_DEPTH) -> object:
    """A value that can be hashed. Python would hash a tuple of any depth, until its stack ends."""
    if isinstance(value, tuple) and depth:
        for item in value:
            _key(item, depth - 1)
    elif value is not None and not isinstance(value, _KEYS):
        raise TypeError(f"a {type(value).__name__} is no key")
    return value


_KEYS = (str, bytes, int, float, Global, Call)
_PUSHED = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BYTEARRAY8"),
    }
)
_MADE: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_METHODS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.proto,
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple_of,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "LIST": _Machine.list_of,
    "DICT": _Machine.dict_of,
    "FROZENSET": _Machine.frozenset_of,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.appends,
    "SETITEM": _Machine.setitem,
    "SETITEMS": _Machine.setitems,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": _Machine.dup,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stack_name,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.new,
    "NEWOBJ_EX": _Machine.new_with_names,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.elsewhere,
    "STOP": _Machine.stop,
}
