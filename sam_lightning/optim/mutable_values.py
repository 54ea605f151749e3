"""Puts back what lies in lists, dictionaries, arrays and generators."""

import random
from collections import OrderedDict, deque
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Restore = Callable[[], None]

SMALL = 2**20  # bytes up to which a tensor or an array is copied in every step rather than watched
_IMMUTABLE = frozenset({int, float, bool, str, bytes, type(None), FunctionType, MethodType, torch.device, torch.dtype})
_LONG = 10_000  # elements beyond which a list is taken for one that only grows, and a dictionary is left alone


def is_small(tensor: Tensor) -> bool:
    """Whether copying the tensor costs a step nothing that could be measured."""
    return tensor.numel() * tensor.element_size() <= SMALL


def restorer(value: Any, met: frozenset[int] = frozenset()) -> Restore | None:
    """A function that gives `value` the contents that it has now; `None` where nothing in it can change.

    Looks into lists, dictionaries, sets and deques, NumPy arrays of up to 1 MiB, tensors in dictionaries, and random
    number generators of torch, NumPy and Python. Longer lists are cut to their length.
    """
    if type(value) in _IMMUTABLE or isinstance(value, Tensor | nn.Module):
        return None
    if isinstance(value, list | dict) and id(value) in met:  # it contains itself
        return None
    if isinstance(value, list):
        return _of_list(value, met | {id(value)})
    if isinstance(value, dict):
        return _of_dict(value, met | {id(value)}) if len(value) <= _LONG else None
    if isinstance(value, set | deque):
        return _of_elements(value) if len(value) <= _LONG else None
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


def _of_list(value: list[Any], met: frozenset[int]) -> Restore:
    length = len(value)
    if length > _LONG:
        return lambda: value.__delitem__(slice(length, None))
    elements = list(value)
    inner = [put for element in elements if (put := restorer(element, met))]

    def restore() -> None:
        value[:] = elements
        for restore_element in inner:
            restore_element()

    return restore


def _of_dict(value: dict[Any, Any], met: frozenset[int]) -> Restore:
    items = dict(value)
    inner = [put for element in items.values() if (put := _of_tensor(element) or restorer(element, met))]

    def restore() -> None:
        kind = OrderedDict if isinstance(value, OrderedDict) else dict  # a subclass may count or refuse what is written
        kind.clear(value)
        kind.update(value, items)
        for restore_element in inner:
            restore_element()

    return restore


def _of_elements(value: set[Any] | deque[Any]) -> Restore:
    elements = list(value)

    def restore() -> None:
        value.clear()
        value.update(elements) if isinstance(value, set) else value.extend(elements)

    return restore


def _of_array(value: np.ndarray[Any, Any]) -> Restore:
    copied = value.copy()

    def restore() -> None:
        value[...] = copied

    return restore


def _of_tensor(value: Any) -> Restore | None:
    if not isinstance(value, Tensor) or value.requires_grad or not is_small(value):
        return None
    copied = value.detach().clone()

    @torch.no_grad()
    def restore() -> None:
        value.copy_(copied)

    return restore
