"""Algebra over lists of tensors, which together are one vector, without waiting for an accelerator."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import overload

import torch
from torch import Tensor

from sam_lightning.tensors.norms import global_norm, reciprocal
from sam_lightning.tensors.shards import are_sharded, full_tensor

_PIECE = 2**18  # entries that stay in a processor's cache through several operations
_PIECE_OF_DEVICE = 2**24  # that keep an accelerator busy
_FUSED = (torch.float32, torch.float16, torch.bfloat16)  # its learning rate is a float32


class Scaled(Sequence[Tensor]):
    """factor * vectors, multiplied only where a single one is looked at: added to weights, they need no memory.

    Args:
        vectors: Any tensors; they are not changed.
        factor: A number, or a 0-dimensional tensor where the host does not know it. 0 stands for "nothing", even
            where a vector is not finite.
    """

    def __init__(self, vectors: Sequence[Tensor], factor: Tensor | float) -> None:
        self.vectors = vectors
        self.factor = factor

    def __len__(self) -> int:
        return len(self.vectors)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> "Scaled": ...

    def __getitem__(self, index: int | slice) -> "Tensor | Scaled":
        if isinstance(index, slice):
            return Scaled(self.vectors[index], self.factor)
        zero = torch.zeros_like(self.vectors[index])
        add_([zero], Scaled([self.vectors[index]], self.factor), 1.0)
        return zero


class Deferred(Sequence[Tensor]):
    """Vectors that are computed where they are added, from what their targets are until then: they take no memory."""

    @abstractmethod
    def add_to_(self, targets: list[Tensor], factor: float) -> None:
        """Targets += factor * vectors."""


def unit_vector(vectors: list[Tensor]) -> Scaled:
    """The vectors over their L2 norm, all together; nothing where that is 0 or not finite."""
    return Scaled(vectors, reciprocal(global_norm(vectors)))


@torch.no_grad()
def add_(targets: list[Tensor], vectors: Sequence[Tensor], factor: float) -> None:
    """Targets += factor * vectors, in one multi-tensor operation where torch has it."""
    if not targets:
        return
    if isinstance(vectors, Deferred):
        vectors.add_to_(targets, factor)
        return
    scale: Tensor | float = factor
    if isinstance(vectors, Scaled):
        scale = vectors.factor
        vectors = vectors.vectors
        if isinstance(scale, Tensor) and targets[0].dtype is torch.float64:
            scale = scale.double()
        scale = factor * scale
    vectors = list(vectors)
    if not isinstance(scale, Tensor):
        if scale == 0:
            return
        if abs(scale) <= torch.finfo(torch.float16).max or all(v.dtype is not torch.float16 for v in vectors):
            torch._foreach_add_(targets, vectors, alpha=scale)
        else:  # torch does not take such a number beside float16
            torch._foreach_add_(targets, list(torch._foreach_mul(vectors, scale)))
    elif _alike(targets + vectors) and all(t.stride() == v.stride() for t, v in zip(targets, vectors, strict=True)):
        # The only multi-tensor operation of torch that scales by what the host does not know, and that skips all of
        # it by a flag: plain gradient descent. On the CPU it goes through memory without a look at strides.
        torch._fused_sgd_(
            targets,
            vectors,
            [],
            weight_decay=0.0,
            momentum=0.0,
            lr=scale.float(),
            dampening=0.0,
            nesterov=False,
            maximize=True,
            is_first_step=True,
            found_inf=(scale == 0).float(),
        )
    else:
        if any(v.device != scale.device for v in vectors):
            scaled = [v * scale.to(v.device) for v in vectors]
        else:
            scaled = list(torch._foreach_mul(vectors, scale))
        _without_nan_(scaled)
        torch._foreach_add_(targets, scaled)


@torch.no_grad()
def multiply_(tensors: list[Tensor], factor: Tensor | float) -> None:
    """Tensors *= factor, which may lie on another device than some of them."""
    if isinstance(factor, Tensor) and any(t.device != factor.device for t in tensors):
        for tensor in tensors:
            tensor.mul_(factor.to(tensor.device))
    else:
        torch._foreach_mul_(tensors, factor)


@torch.no_grad()
def divide_by_norm(vectors: list[Tensor], norm: Tensor) -> list[Tensor]:
    """Each vector divided by `norm`, where torch can do so in its own memory; zeros if `norm` is 0 or not finite."""
    factor = reciprocal(norm)
    if isinstance(factor, Tensor):
        multiply_(vectors, factor)
        _without_nan_(vectors)
        return vectors
    if factor == 0:
        return [torch.zeros_like(vector) for vector in vectors]
    if factor > torch.finfo(torch.float16).max:  # in place it is first rounded to the vectors' type
        return list(torch._foreach_mul(vectors, factor))
    multiply_(vectors, factor)
    return vectors


def _without_nan_(vectors: list[Tensor]) -> None:
    """Puts 0 where a vector is not finite: 0 * inf is NaN."""
    for vector in vectors:
        vector.nan_to_num_(0.0, 0.0, 0.0)


def _alike(tensors: list[Tensor]) -> bool:
    first = tensors[0]
    return (
        first.dtype in _FUSED
        and first.device.type in ("cpu", "cuda")
        and not any(are_sharded(tensors))
        and all(t.dtype is first.dtype and t.device == first.device for t in tensors)
    )


def in_pieces(*lists: list[Tensor]) -> Iterator[tuple[list[int], list[list[Tensor]]]]:
    """Goes through lists of tensors of equal shapes a few entries at a time, as many as its device works on best.

    Gives the index of each piece's tensor, and the pieces of each list: views of one device and type. Sharded tensors
    come whole and all at once.
    """
    if any(are_sharded([tensor for tensors in lists for tensor in tensors])):
        yield list(range(len(lists[0]))), list(lists)
        return
    index: list[int] = []
    found: list[tuple[Tensor, ...]] = []
    entries, last = 0, None
    for i, tensors in enumerate(zip(*lists, strict=True)):
        kind = tensors[0].device, tensors[0].dtype
        limit = _PIECE if kind[0].type == "cpu" else _PIECE_OF_DEVICE
        for views in _cut(tensors, limit):
            if found and (kind != last or entries + views[0].numel() > limit):
                yield index, [list(pieces) for pieces in zip(*found, strict=True)]
                index, found, entries = [], [], 0
            index.append(i)
            found.append(views)
            entries, last = entries + views[0].numel(), kind
    if found:
        yield index, [list(pieces) for pieces in zip(*found, strict=True)]


def _cut(tensors: tuple[Tensor, ...], limit: int) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, or where they are large and their entries lie alike in memory, views of some of these entries."""
    first = tensors[0]
    if first.numel() <= limit or any(t.stride() != first.stride() for t in tensors):
        return iter([tensors])
    order = sorted(range(first.ndim), key=first.stride, reverse=True)
    try:
        flat = [t.permute(order).view(-1) for t in tensors]
    except RuntimeError:  # with gaps in memory
        return iter([tensors])
    return zip(*(torch.split(t, limit) for t in flat), strict=True)


@torch.no_grad()
def inner_product(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """<a, b> over all entries together, 0-dimensional, real; half precision is summed in float32.

    Of sharded tensors, over all their shards: every process must call this.
    """
    products = []
    for x, y in zip(a, b, strict=True):
        if x.dtype in (torch.float16, torch.bfloat16):
            x, y = x.float(), y.float()
        product = (x * y.conj()).real if x.is_complex() else x * y
        products.append(product.sum().to(a[0].device))
    return full_tensor(torch.stack(products).sum()) if products else torch.zeros(())
