"""Puts back what lies in lists, dictionaries, arrays and generators."""

import random
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Restore = Callable[[], None]

SMALL = 2**20  # bytes up to which a tensor or an array is copied in every step rather than watched
# What `restorer` looks into.
MUTABLE = (
    *(list, tuple, dict, set, deque),
    *(np.ndarray, torch.Generator, np.random.Generator, np.random.RandomState, random.Random),
)
_IMMUTABLE = frozenset({int, float, bool, str, bytes, type(None), FunctionType, MethodType, torch.device, torch.dtype})


def is_constant(value: Any) -> bool:
    """Whether it is a tuple of numbers and the like, as layers have many."""
    return type(value) is tuple and all(type(element) in _IMMUTABLE for element in value)


def is_small(tensor: Tensor) -> bool:
    """Whether copying the tensor costs a step nothing that could be measured."""
    return tensor.numel() * tensor.element_size() <= SMALL


@dataclass
class Budget:
    """How much may still be copied, so that a module that holds its data costs a step nothing either.

    Attributes:
        elements: Of containers, on all levels together.
        met: Containers that have been looked into, by identity: one may contain itself.
    """

    elements: int = 10_000
    met: set[int] = field(default_factory=set)

    def takes(self, container: Any) -> bool:
        """Whether the container can be copied; then its elements are spent."""
        if id(container) in self.met or len(container) > self.elements:
            return False
        self.met.add(id(container))
        self.elements -= len(container)
        return True


def restorer(value: Any, budget: Budget) -> Restore | None:
    """A function that gives `value` the contents that it has now; `None` where nothing in it can change.

    Looks into lists, tuples, dictionaries, sets and deques, NumPy arrays and tensors in containers of up to 1 MiB, and
    random number generators of torch, NumPy and Python. A list beyond the budget is cut to its length.
    """
    if type(value) in _IMMUTABLE or isinstance(value, Tensor | nn.Module):
        return None
    if isinstance(value, list | tuple | dict | set | deque):
        return _of_container(value, budget)
    if isinstance(value, np.ndarray):
        return _of_array(value) if value.nbytes <= SMALL and value.flags.writeable else None
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: (value.set_state(state), None)[1]
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        bit_state = bits.state
        return lambda: setattr(bits, "state", bit_state)
    if isinstance(value, np.random.RandomState):
        numpy_state = value.get_state(legacy=True)
        return lambda: value.set_state(numpy_state)
    if isinstance(value, random.Random):
        python_state = value.getstate()
        return lambda: value.setstate(python_state)
    return None


def _of_container(value: Any, budget: Budget) -> Restore | None:
    if not budget.takes(value):
        length = len(value)
        is_long_list = isinstance(value, list) and id(value) not in budget.met
        return (lambda: value.__delitem__(slice(length, None))) if is_long_list else None
    contents = dict(value) if isinstance(value, dict) else list(value)
    elements = contents.values() if isinstance(contents, dict) else contents
    mutable = [element for element in elements if type(element) not in _IMMUTABLE]
    inner = [put for element in mutable if (put := _of_tensor(element) or restorer(element, budget))]

    def restore() -> None:
        if isinstance(value, dict):
            kind = OrderedDict if isinstance(value, OrderedDict) else dict  # a subclass may count what is written
            kind.clear(value)
            kind.update(value, contents)
        elif isinstance(value, list):
            value[:] = contents
        elif isinstance(value, set | deque):
            value.clear()
            value.update(contents) if isinstance(value, set) else value.extend(contents)
        for restore_element in inner:
            restore_element()

    return restore


def _of_array(value: np.ndarray[Any, Any]) -> Restore:
    copied = value.copy()

    def restore() -> None:
        value[...] = copied

    return restore


def _of_tensor(value: Any) -> Restore | None:
    is_state = isinstance(value, Tensor) and not value.requires_grad and value.layout == torch.strided
    if not is_state or value.is_inference() or not is_small(value):
        return None
    copied, version = value.detach().clone(), value._version

    @torch.no_grad()
    def restore() -> None:
        if value._version != version:
            value.copy_(copied)

    return restore
