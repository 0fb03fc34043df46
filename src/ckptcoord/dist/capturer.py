"""Captures of the same components, save after save: what is as it was is not worked out again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ckptcoord.core.outline import Outline, compile_outline
from ckptcoord.dist.capture import (
    CapturedComponent,
    CapturedTensor,
    Document,
    TorchAdapter,
    capture_state,
    dump_document,
    hf_config,
    live_state,
    spec_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ckptcoord.core.sharing import StateComponent
    from ckptcoord.repo.shards import TensorSpec

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_TRIES = 3  # saves in a row unlike the one before, after which no other is expected to be like it
# Of all tensors, one fact at a time: functions in C, called from C.
_TENSOR: Any = torch.Tensor
_LAYOUT = _TENSOR.layout.__get__
_FACTS = (
    *(_TENSOR.get_device, _TENSOR.dtype.__get__, _TENSOR.size, _TENSOR.stride),
    *(_TENSOR.storage_offset, _TENSOR.is_conj, _TENSOR.is_neg),
)
_Facts: TypeAlias = list[list[object]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Form:
    """What there is to say of a component's tensors but for where they are and what they hold.

    As long as it is the same object, so are names, dtypes, shapes, strides, devices and ties, and
    the types, which are torch's own.
    """

    specs: tuple[TensorSpec, ...]


class LiveTensors(Mapping[str, CapturedTensor]):
    """The tensors of a `CapturedComponent` that are of a form; each is made when it is asked for.

    Attributes:
        form: of all.
        live: they, in order.
        addresses: of the first byte of each.
    """

    __slots__ = ("_by_name", "addresses", "form", "live")

    def __init__(self, form: Form, live: Sequence[torch.Tensor], addresses: Sequence[int]) -> None:
        self.form = form
        self.live = live
        self.addresses = addresses
        self._by_name: dict[str, CapturedTensor] | None = None

    def __getitem__(self, name: str) -> CapturedTensor:
        return self._made()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made())

    def __len__(self) -> int:
        return len(self.live)

    def _made(self) -> dict[str, CapturedTensor]:
        if self._by_name is None:
            self._by_name = {
                spec.name: CapturedTensor(spec=spec, value=value)
                for spec, value in zip(self.form.specs, self.live, strict=True)
            }
        return self._by_name


def form_of(captured: CapturedComponent) -> Form | None:
    """The form of a component's tensors, where they have one."""
    return captured.tensors.form if isinstance(captured.tensors, LiveTensors) else None


class Capturer:
    """Captures components as `capture` does, in less time where they are built as they were.

    Of the state itself it keeps nothing.
    """

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def capture(self, component: StateComponent) -> CapturedComponent:
        """Ask a component for its state and take it apart. Nothing is copied.

        Raises:
            UnsupportedStateError: something in it has no pickle-free form. That its document is too
                large, the document says when it is asked for.
            CkptError: its own code raised.
        """
        state = live_state(component)
        known = self._known.setdefault(component.key, _Known())
        return known.capture(component, state) or known.learn(component, state)


class _Known:
    """What is known of a component from the saves before."""

    def __init__(self) -> None:
        self._outline: Outline | None = None
        self._form: Form | None = None
        self._facts: _Facts = []
        self._addresses: list[int] = []
        self._tries = 0

    def capture(self, component: StateComponent, state: object) -> CapturedComponent | None:
        """The state, if it is built as the one before; else None."""
        outline = self._outline
        match = None if outline is None else outline.match(state)
        if outline is None or match is None or not self._see(component.key, outline, match.slots):
            return None
        assert self._form is not None, "it was seen"
        self._tries = 0
        live = [match.slots[first] for first in outline.firsts]
        addresses = [self._addresses[first] for first in outline.firsts]
        document = Document(component, partial(outline.document, match.constants))
        return CapturedComponent(
            component=component,
            state=document,
            tensors=LiveTensors(self._form, live, addresses),
            config=hf_config(component),
        )

    def learn(self, component: StateComponent, state: object) -> CapturedComponent:
        """The state, and from it what the next one is expected to be like."""
        self._outline = self._form = None
        captured = capture_state(component, state)
        if self._tries < _TRIES:
            self._tries += 1
            dump = partial(dump_document, component.key)
            self._outline = compile_outline(state, captured.document, TorchAdapter(), _PLAIN, dump)
        return captured

    def _see(self, key: str, outline: Outline, slots: Sequence[torch.Tensor]) -> bool:
        """Whether tensors are tied as the outline has it; then their form and place are known."""
        if list(map(_LAYOUT, slots)).count(torch.strided) != len(slots):
            return False
        facts = [list(map(fact, slots)) for fact in _FACTS]
        addresses = list(map(_TENSOR.data_ptr, slots))
        alike = self._form is not None and facts == self._facts
        if not alike or addresses != self._addresses:
            identity = TorchAdapter().identity
            if not outline.is_tied([identity(slot) for slot in slots]):
                return False
        if not alike:
            firsts = zip(outline.names, outline.firsts, strict=True)
            self._form = Form(specs=tuple(spec_of(key, name, slots[at]) for name, at in firsts))
        self._facts, self._addresses = facts, addresses
        return True
