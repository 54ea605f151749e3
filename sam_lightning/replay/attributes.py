"""The attributes of a module, of its submodules, and of the plain objects that they hold."""

from collections.abc import Iterator, MutableMapping
from operator import is_
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from sam_lightning.replay.mutable_values import MUTABLE, Budget, Restore, is_constant, is_small, restorer

# And what stands in for a method of a LightningModule while it trains.
MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) | {"log"}
_NO_COLLECTION = frozenset({int, float, bool, str, type(None), FunctionType, MethodType, ModuleType, Tensor})
_MANY = 1000
# Objects of these packages are settings or machinery, not what a training step counts and collects.
_MACHINERY = {
    *("builtins", "functools", "torch", "torchvision", "lightning", "pytorch_lightning", "numpy", "omegaconf"),
    "sam_lightning",
}


class Owner:
    """A dictionary of attributes, and which of its values a pass may change from within, as of the last look.

    Most modules hold the same values in every step. Those of the last look are compared by identity, which takes a
    microsecond, and are sorted anew only where one was replaced.

    Args:
        prefix: Of the names of what it holds.
        attributes: The dictionary itself.
        is_buffers: Whether it is a module's buffers.

    Attributes:
        values: All but what every `nn.Module` has.
        mutable: Values that are or hold something with contents of their own.
        tensors: Tensors, by name.
        containers: Lists, tuples and dictionaries, by name.
        holders: Values that are or hold plain objects of the user's, by name.
    """

    def __init__(self, prefix: str, attributes: MutableMapping[str, Any], is_buffers: bool) -> None:
        self.prefix = prefix
        self.attributes = attributes
        self.is_buffers = is_buffers
        self._sort()

    def holds_the_same(self) -> bool:
        """Whether keys and values are those of the last look."""
        seen, now = self._seen, self.attributes
        return len(seen) == len(now) and all(map(is_, seen.values(), now.values())) and list(seen) == list(now)

    def look(self) -> None:
        """Sorts the values if others are there."""
        if not self.holds_the_same():
            self._sort()

    def _sort(self) -> None:
        self._seen = dict(self.attributes)
        self.values = {key: value for key, value in self._seen.items() if key not in MODULE_ATTRIBUTES}
        self.tensors = [(key, value) for key, value in self._seen.items() if isinstance(value, Tensor)]
        others = [(key, value) for key, value in self.values.items() if not is_constant(value)]
        self.mutable = [value for _, value in others if isinstance(value, MUTABLE)]
        self.containers = [(key, value) for key, value in others if isinstance(value, list | tuple | dict)]
        self.holders = self.containers + [(key, value) for key, value in others if _collects(value)]

    def tensors_within(self) -> Iterator[tuple[str, Tensor]]:
        """Its tensors, and large ones in its containers, with which small ones are copied."""
        yield from self.tensors
        for key, value in self.containers:
            if len(value) <= _MANY:
                elements = value.items() if isinstance(value, dict) else enumerate(value)
                yield from ((f"{key}.{i}", e) for i, e in elements if isinstance(e, Tensor) and not is_small(e))


class Attributes:
    """The attributes of all owners at one moment, and what their mutable values hold."""

    def __init__(self, owners: list[Owner]) -> None:
        """Of owners that have just been looked at."""
        budget = Budget()
        self._values = [(owner, owner.values) for owner in owners]
        mutable = (value for owner in owners for value in owner.mutable)
        self._restorers: list[Restore] = [restore for value in mutable if (restore := restorer(value, budget))]

    def restore(self) -> None:
        """Gives every owner the attributes that it had, and their values what they held."""
        for owner, values in self._values:
            if owner.values is values and owner.holds_the_same():
                continue
            attributes = owner.attributes
            for key in [key for key in attributes if key not in values and key not in MODULE_ATTRIBUTES]:
                del attributes[key]
            for key, value in values.items():
                if attributes.get(key, self) is not value:
                    attributes[key] = value
        for restore in self._restorers:
            restore()


def with_prefixes(
    module: nn.Module, prefix: str = "", met: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """(prefix of the names, module) of all modules, each once; less general than `named_modules`, and faster."""
    met = set() if met is None else met
    if module not in met:
        met.add(module)
        yield prefix, module
        for name, child in module._modules.items():
            if child is not None:
                yield from with_prefixes(child, f"{prefix}{name}.", met)


def _collects(value: Any) -> bool:
    """Whether this is a plain object of the user's, which may collect or count something."""
    if type(value) in _NO_COLLECTION or isinstance(value, nn.Module | Tensor | type):
        return False
    kinds = type(value).__mro__[:-1]  # a Trainer or a data set of the user's own is machinery, too
    return hasattr(value, "__dict__") and not any(kind.__module__.partition(".")[0] in _MACHINERY for kind in kinds)


def objects_in(value: Any, prefix: str, met: set[int]) -> Iterator[tuple[str, Any]]:
    """(prefix of the names, object) of plain objects that `value` is or holds, on all levels; a thousand at most."""
    if type(value) in _NO_COLLECTION or id(value) in met or len(met) > _MANY:
        return
    if isinstance(value, list | tuple | dict):
        if len(value) <= _MANY:
            met.add(id(value))
            for key, element in value.items() if isinstance(value, dict) else enumerate(value):
                yield from objects_in(element, f"{prefix}{key}.", met)
    elif _collects(value):
        met.add(id(value))
        yield prefix, value
        for key, held in vars(value).items():
            yield from objects_in(held, f"{prefix}{key}.", met)
