"""Cuts a batch of any structure into micro-batches."""

from typing import Any, TypeAlias

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

MicroBatch: TypeAlias = tuple[Any, float]  # a part of the batch, and its share of the samples


def split_batch(batch: Any, count: int) -> list[MicroBatch]:
    """Cuts every tensor of `batch` along its first dimension into `count` parts, as equal as they can be.

    Args:
        batch: Tensors of equal length in tuples, lists, dictionaries or dataclasses; whatever else is in
            there goes to every part as it is.
        count: Number of parts; fewer if the batch has fewer samples.

    Returns:
        The parts with their shares, which sum to 1: the mean over the batch is the sum of share * mean.

    Raises:
        TypeError: If there is no tensor to cut.
        ValueError: If the tensors differ in length.
    """
    if count == 1:
        return [(batch, 1.0)]
    lengths = _lengths(batch)
    if not lengths:
        raise TypeError("accumulate > 1 cuts the batch's tensors, and there is none with a first dimension.")
    if len(set(lengths)) > 1:
        raise ValueError(f"accumulate > 1 needs tensors of one length in a batch, got {sorted(set(lengths))}.")
    count = min(count, lengths[0])

    def part(tensor: Tensor, i: int) -> Tensor:
        return torch.tensor_split(tensor, count)[i] if tensor.ndim else tensor

    parts = [apply_to_collection(batch, Tensor, part, i) for i in range(count)]
    sizes = [len(chunk) for chunk in torch.empty(lengths[0]).tensor_split(count)]
    return [(micro_batch, size / lengths[0]) for micro_batch, size in zip(parts, sizes, strict=True)]


def common_length(batch: Any) -> int | None:
    """The number of samples in `batch`; `None` if its tensors do not tell."""
    lengths = set(_lengths(batch))
    return lengths.pop() if len(lengths) == 1 else None


def _lengths(batch: Any) -> list[int]:
    lengths: list[int] = []
    apply_to_collection(batch, Tensor, lambda tensor: lengths.append(len(tensor)) if tensor.ndim else None)
    return lengths
