"""Cuts a batch of any structure into micro-batches."""

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sam_lightning.replay.batch_copies import rebuilt, tensors_in

MicroBatch: TypeAlias = tuple[Any, float]  # a part of the batch, and its share of the samples


def split_batch(batch: Any, count: int, module: nn.Module | None = None) -> list[MicroBatch]:
    """Cuts every tensor of `batch` along its first dimension into `count` parts, as equal as they can be.

    Args:
        batch: Tensors of equal length in tuples, lists, dictionaries, dataclasses or other objects; whatever else is
            in there goes to every part as it is.
        count: Number of parts; fewer if the batch has fewer samples.
        module: Cuts the batch itself if it has a method `split_batch(batch, count)`, which returns such a list as this
            function does. Needed for batches of other kinds, such as lists of samples.

    Returns:
        The parts with their shares, which sum to 1: the mean over the batch is the sum of share * mean.

    Raises:
        TypeError: If there is no tensor to cut, or if the batch is a list that may be one of samples.
        ValueError: If the tensors differ in length.
    """
    if count == 1:
        return [(batch, 1.0)]
    own = getattr(module, "split_batch", None)
    if own is not None:
        parts: list[MicroBatch] = own(batch, count)
        return parts
    lengths = _lengths(batch)
    if not lengths:
        raise TypeError("micro_batches > 1 cuts the batch's tensors, and there is none with a first dimension.")
    if len(set(lengths)) > 1:
        raise ValueError(
            f"micro_batches > 1 needs tensors of one length in a batch, got {sorted(set(lengths))}; give the module a "
            "method split_batch(batch, count) -> list of (part, share of the samples)."
        )
    if _may_be_samples(batch, lengths[0]):
        raise TypeError(
            f"micro_batches > 1: this batch is a list of {len(batch)} tensors of {lengths[0]} rows, which may be as "
            "many samples; give the module a method split_batch(batch, count) -> list of (part, share of the samples)."
        )
    count = min(count, lengths[0])

    def part(i: int) -> Any:
        return rebuilt(batch, lambda tensor: torch.tensor_split(tensor, count)[i] if tensor.ndim else tensor)

    cut = [part(i) for i in range(count)]
    sizes = [len(chunk) for chunk in torch.empty(lengths[0]).tensor_split(count)]
    return [(micro_batch, size / lengths[0]) for micro_batch, size in zip(cut, sizes, strict=True)]


def common_length(batch: Any) -> int | None:
    """The number of samples in `batch`; `None` if its tensors do not tell."""
    lengths = set(_lengths(batch))
    if len(lengths) != 1 or _may_be_samples(batch, min(lengths)):
        return None
    return lengths.pop()


def _may_be_samples(batch: Any, length: int) -> bool:
    """Whether a list of tensors alone, alike but for their values, may hold a sample in each of them.

    The default collation makes lists, too, of one tensor for each part of a sample; those of images and labels differ
    in shape.
    """
    if not isinstance(batch, list) or len(batch) < 2 or not all(isinstance(part, Tensor) for part in batch):
        return False
    return len({(part.shape, part.dtype) for part in batch}) == 1 and batch[0].ndim > 1


def _lengths(batch: Any) -> list[int]:
    return [len(tensor) for tensor in tensors_in(batch) if tensor.ndim]
