"""The attributes of a module, of its submodules, and of the plain objects that they hold."""

from collections.abc import Iterator, MutableMapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from sam_lightning.replay.mutable_values import Budget, Restore, is_small, restorer

# And what stands in for a method of a LightningModule while it trains.
MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) | {"log"}
_NO_COLLECTION = frozenset({int, float, bool, str, type(None), FunctionType, MethodType, ModuleType, Tensor})
_MANY = 1000
# Objects of these packages are settings or machinery, not what a training step counts and collects.
_MACHINERY = {
    *("builtins", "functools", "torch", "torchvision", "lightning", "pytorch_lightning", "numpy", "omegaconf"),
    "sam_lightning",
}


class Attributes:
    """The attributes of all owners at one moment, and what their mutable values hold."""

    def __init__(self, owners: list[tuple[str, MutableMapping[str, Any], bool]]) -> None:
        self._values: list[tuple[MutableMapping[str, Any], dict[str, Any]]] = []
        self._restorers: list[Restore] = []
        budget = Budget()
        for _, attributes, _ in owners:
            values = {key: value for key, value in attributes.items() if key not in MODULE_ATTRIBUTES}
            self._values.append((attributes, values))
            self._restorers += [restore for value in values.values() if (restore := restorer(value, budget))]

    def restore(self) -> None:
        """Gives every owner the attributes that it had, and their values what they held."""
        for attributes, values in self._values:
            for key in [key for key in attributes if key not in values and key not in MODULE_ATTRIBUTES]:
                del attributes[key]
            for key, value in values.items():
                if attributes.get(key, self) is not value:
                    attributes[key] = value
        for restore in self._restorers:
            restore()


def with_prefixes(module: nn.Module, prefix: str, met: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """(prefix of the names, module) of all modules, each once; less general than `named_modules`, and faster."""
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


def tensors_of(attributes: MutableMapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors among the attributes, and large ones in their containers, with which small ones are copied."""
    for key, value in attributes.items():
        if isinstance(value, Tensor):
            yield key, value
        elif isinstance(value, list | tuple | dict) and len(value) <= _MANY and key not in MODULE_ATTRIBUTES:
            elements = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((f"{key}.{i}", e) for i, e in elements if isinstance(e, Tensor) and not is_small(e))
