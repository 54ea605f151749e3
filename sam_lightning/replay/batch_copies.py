"""A batch for a second pass, whatever the first one does to its own."""

import copy
from collections.abc import Callable, MutableMapping
from dataclasses import fields, is_dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


def rebuilt(batch: Any, tensor: Callable[[Tensor], Tensor] = lambda t: t) -> Any:
    """`batch` in containers of its own: what is put into one of them, or taken out, stays there.

    Args:
        batch: Lists, tuples, named tuples, dictionaries, dataclasses and other objects that hold tensors.
        tensor: What becomes of each tensor in them; by default itself.
    """
    if isinstance(batch, Tensor):
        return tensor(batch)
    if isinstance(batch, PackedSequence):
        return PackedSequence(tensor(batch.data), batch.batch_sizes, batch.sorted_indices, batch.unsorted_indices)
    if isinstance(batch, tuple):
        parts = [rebuilt(part, tensor) for part in batch]
        if hasattr(batch, "_fields"):
            return type(batch)(*parts)
        return tuple(parts) if type(batch) is tuple else batch  # of a class of one's own, made in its own way
    if not (hasattr(batch, "__dict__") or hasattr(batch, "__copy__") or isinstance(batch, list | dict)):
        return batch  # a number, a string
    try:
        new: Any = copy.copy(batch)
    except Exception:  # an object that cannot be copied goes into both passes as it is
        return batch
    if isinstance(batch, list):
        new[:] = [rebuilt(part, tensor) for part in batch]
    elif isinstance(batch, MutableMapping):
        for key, part in batch.items():
            new[key] = rebuilt(part, tensor)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for field in fields(batch):
            if hasattr(batch, field.name):
                object.__setattr__(new, field.name, rebuilt(getattr(batch, field.name), tensor))
    elif not isinstance(batch, nn.Module | type | FunctionType | MethodType) and hasattr(new, "__dict__"):
        for key, part in vars(new).items():
            if isinstance(part, Tensor | list | tuple | dict):
                vars(new)[key] = rebuilt(part, tensor)
    return new


def tensors_in(batch: Any) -> list[Tensor]:
    """All tensors in the containers that `rebuilt` knows."""
    found: list[Tensor] = []
    rebuilt(batch, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def version(tensor: Tensor) -> int:
    """How often the tensor was changed in place, as autograd counts; 0 where it does not count."""
    return 0 if tensor.is_inference() else tensor._version


class BatchCopies:
    """Keeps a batch as it comes, at no cost for a step that does not change its tensors in place.

    All tensors are copied in the first step, and compared after it. Afterwards version counters tell, and copies are
    made only for a step that is known to change tensors.
    """

    def __init__(self) -> None:
        self.changes_tensors: bool | None = None  # unknown until the first batch has been used
        self._batch: Any = None
        self._originals: list[tuple[Tensor, int]] = []

    def keep(self, batch: Any) -> None:
        """Keeps `batch`, before the first pass."""
        self._originals = []
        copies = self.changes_tensors is not False

        def kept(tensor: Tensor) -> Tensor:
            self._originals.append((tensor, version(tensor)))
            return tensor.detach().clone().requires_grad_(tensor.requires_grad) if copies else tensor

        self._batch = rebuilt(batch, kept)

    def take(self) -> tuple[Any, bool]:
        """The batch for the second pass, and whether it is as it came.

        It is not where a step changes a tensor in place for the first time later than in its first batch.
        """
        changed = any(version(tensor) != before for tensor, before in self._originals)
        as_it_came = True
        if self.changes_tensors is None:
            copies = tensors_in(self._batch)
            self.changes_tensors = changed or not all(
                torch.equal(tensor, copied)
                for (tensor, _), copied in zip(self._originals, copies, strict=True)
                if tensor.layout == torch.strided
            )
        elif changed and not self.changes_tensors:
            self.changes_tensors, as_it_came = True, False
        batch, self._batch, self._originals = self._batch, None, []
        return batch, as_it_came
