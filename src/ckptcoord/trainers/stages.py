"""A model in parts, one a rank, whose parameters keep their names in the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from torch import nn

from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch


class Layered(Protocol):
    """A model that says what its layers are, for `split_layers`."""

    def pipeline_layers(self) -> Sequence[nn.Module]:
        """Modules that give the model's output one after the other, each of the one before.

        They are made of modules and parameters of the model, and add none of their own.
        """
        ...


def split_layers(model: nn.Module, stages: int) -> list[nn.Module]:
    """The layers of a model in so many runs, as equal in number as can be.

    Args:
        model: an `nn.Sequential`, or anything with `pipeline_layers()`, see `Layered`.
        stages: how many.

    Raises:
        ConfigError: the model has no such layers, or too few.
    """
    own_layers = getattr(model, "pipeline_layers", None)
    if callable(own_layers):
        layers = list(own_layers())
    elif isinstance(model, nn.Sequential):
        layers = list(model)
    else:
        raise ConfigError(
            field="model",
            why=f"is a {type(model).__name__}, neither an nn.Sequential nor with pipeline_layers()",
            help="Give it pipeline_layers(), or override pipeline_split()",
        )
    if len(layers) < stages:
        raise ConfigError(
            field="model",
            why=f"has {len(layers)} layers, fewer than the {stages} stages",
            help="Start fewer ranks",
        )
    cuts = [place * len(layers) // stages for place in range(stages + 1)]
    return [nn.Sequential(*layers[cuts[i] : cuts[i + 1]]) for i in range(stages)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """A parameter that several stages hold, each its own copy: their gradients are one sum.

    Attributes:
        name: the first of its names in the whole model.
        stages: which hold it, ascending.
        parameter: the whole model's.
    """

    name: str
    stages: tuple[int, ...]
    parameter: torch.Tensor


class Names:
    """Of all modules, parameters and buffers of a whole model, by identity."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {id(module): name for name, module in model.named_modules()}
        every = model.named_modules(remove_duplicate=False)
        self.places = {name: place for place, (name, _) in enumerate(every)}
        self.parameters = {id(tensor): name for name, tensor in model.named_parameters()}
        self.buffers = {id(tensor): name for name, tensor in model.named_buffers()}
        kept = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
        self.fleeting = {key for key in self.buffers if key not in kept}  # not in state_dict

    def ties(self, stages: Sequence[nn.Module]) -> list[Tie]:
        """The trained parameters that several stages hold, by name."""
        holders: dict[torch.nn.Parameter, list[int]] = {}
        for place, stage in enumerate(stages):
            for parameter in stage.parameters():
                holders.setdefault(parameter, []).append(place)
        ties = [
            Tie(name=self.parameters[id(parameter)], stages=tuple(found), parameter=parameter)
            for parameter, found in holders.items()
            if len(found) > 1 and parameter.requires_grad and id(parameter) in self.parameters
        ]
        return sorted(ties, key=lambda tie: tie.name)


class _Loan(NamedTuple):
    """A tensor that a module of the user's making borrows from the model, by its own name for it.

    `holder` is where it stands under its name in the model, `table` the name of the dict there.
    """

    owner: nn.Module
    own_name: str
    holder: nn.Module
    name: str
    table: str


class Stage(nn.Module):
    """One part of a model: calls a module, and holds its tensors under their names in the model.

    `named_parameters`, `state_dict` and all that builds on them see the tree of the whole model
    with the other stages' branches gone, in the model's order. What the part itself is made of does
    not show. A parameter that the model has by several names has the first of them in any case, so
    that all stages call it, and what an optimizer holds of it, the same.

    Args:
        part: the module to call. It is made of modules, parameters and buffers of the model.
        names: of the whole model.

    Attributes:
        config: the whole model's, where it has one.

    Raises:
        ConfigError: the part has a tensor that is none of the model's.
    """

    _part: nn.Module
    _loans: list[_Loan]

    def __init__(self, part: nn.Module, names: Names, *, config: object = None) -> None:
        super().__init__()
        self.__dict__["_part"] = part  # not registered: its names are none of the model's
        self._loans = []
        self.config = config
        self._adopt(part, names)
        for parameter in [*self.parameters()]:
            self._enter(names.parameters[id(parameter)], "_parameters", parameter)
        self._sort("", self, names)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (as the part's)
        """As the part."""
        return self._part(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's own signature)
        """Of the part, too: it may look at its mode itself."""
        self._part.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's own signature)
        """Moves and casts go through the part, whose loans are then entered anew."""
        self._part._apply(fn, recurse)  # type: ignore[no-untyped-call]  # noqa: SLF001
        for loan in self._loans:
            getattr(loan.holder, loan.table)[loan.name] = getattr(loan.owner, loan.table)[
                loan.own_name
            ]
        return self

    def all_modules(self) -> Iterator[nn.Module]:
        """The model's and those of the part's own making."""
        yield from self._part.modules()

    def _adopt(self, module: nn.Module, names: Names) -> None:
        """Enter a module under its name, or what is in one that is none of the model's."""
        name = names.modules.get(id(module))
        if name:
            holder, last = self._holder(name)
            holder._modules[last] = module  # noqa: SLF001 (add_module refuses names of methods)
            return
        for table, found in (("_parameters", names.parameters), ("_buffers", names.buffers)):
            for own_name, tensor in getattr(module, table).items():
                if tensor is not None:
                    self._borrow(module, own_name, table, found.get(id(tensor)), names)
        for child in module.children():
            self._adopt(child, names)

    def _borrow(
        self, owner: nn.Module, own_name: str, table: str, name: str | None, names: Names
    ) -> None:
        tensor = getattr(owner, own_name)
        if name is None:
            kind = table.strip("_").removesuffix("s")
            raise ConfigError(
                field="pipeline_split",
                why=f"gave a stage with the {kind} {own_name!r} of shape {list(tensor.shape)}, "
                "which is none of the model's",
                help="Make stages of modules and tensors that the model itself has",
            )
        holder, last = self._enter(name, table, tensor)
        if id(tensor) in names.fleeting:
            holder._non_persistent_buffers_set.add(last)  # noqa: SLF001 (as register_buffer does)
        self._loans.append(
            _Loan(owner=owner, own_name=own_name, holder=holder, name=last, table=table)
        )

    def _enter(self, name: str, table: str, tensor: torch.Tensor) -> tuple[nn.Module, str]:
        holder, last = self._holder(name)
        getattr(holder, table)[last] = tensor
        return holder, last

    def _sort(self, path: str, holder: nn.Module, names: Names) -> None:
        """Containers as the model has them: the first name of a tensor comes first here, too."""
        inner = holder._modules  # noqa: SLF001
        places = {name: names.places[f"{path}{name}"] for name in inner}
        for name in sorted(places, key=places.__getitem__):
            module = inner[name] = inner.pop(name)
            if module is not None and id(module) not in names.modules:
                self._sort(f"{path}{name}.", module, names)

    def _holder(self, name: str) -> tuple[nn.Module, str]:
        """The container for a full name, made where there is none, and the name there."""
        *path, last = name.split(".")
        holder: nn.Module = self
        for atom in path:
            inner = holder._modules.get(atom)  # noqa: SLF001 (get_submodule finds attributes too)
            if inner is None:
                inner = nn.Module()
                holder._modules[atom] = inner  # noqa: SLF001
            holder = inner
        return holder, last


def keep_only(optimizer: torch.optim.Optimizer, module: nn.Module) -> torch.optim.Optimizer:
    """Take all parameters from an optimizer that are none of the module's; groups stay.

    So the groups of all stages are those of the whole model, and their states merge.

    Raises:
        ConfigError: it has none of the module's, which are trained.
    """
    own = {id(parameter) for parameter in module.parameters()}
    for group in optimizer.param_groups:
        keep = [id(parameter) in own for parameter in group["params"]]
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [one for one, kept in zip(group[key], keep, strict=True) if kept]
    for parameter in [one for one in optimizer.state if id(one) not in own]:
        del optimizer.state[parameter]
    trained = any(parameter.requires_grad for parameter in module.parameters())
    if trained and not any(group["params"] for group in optimizer.param_groups):
        raise ConfigError(
            field="optimizer",
            why="steps no parameter of this rank's stage",
            help="Make it of the parameters of the whole model that is passed to the trainer",
        )
    return optimizer
