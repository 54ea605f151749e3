"""The loss around and between solutions: along lines and over planes through the weights."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sam_lightning.runs.atomic_files import replacing
from sam_lightning.sharpness.objective import Loss, objective_of
from sam_lightning.sharpness.preserved_state import BatchNorm

Direction = list[Tensor]  # a tensor for every parameter with requires_grad, of its shape


def random_direction(network: nn.Module, seed: int) -> Direction:
    r"""A Gaussian direction, filter-normalised: $d_{ij} \leftarrow d_{ij} \, \|w_{ij}\| / \|d_{ij}\|$.

    A filter is what leads to one output: the slices along a parameter's first dimension. Parameters of one
    dimension (biases, normalisation) stay where they are, as in the authors' code. A step of 1 then changes every
    filter by its own length, so that rescaled networks look alike.

    Args:
        network: The network; what moves are its parameters with `requires_grad`.
        seed: Seed of the direction, the same on every device.

    Reference:
        Li, Xu, Taylor, Studer, Goldstein. Visualizing the Loss Landscape of Neural Nets. NeurIPS 2018.
        arXiv 1712.09913, section 4.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = []
    for weight in (p.detach() for p in network.parameters() if p.requires_grad):
        drawn = torch.randn(weight.shape, generator=generator).to(weight)
        if weight.ndim < 2:
            direction.append(torch.zeros_like(weight))
            continue
        dims = tuple(range(1, weight.ndim))
        lengths = [torch.linalg.vector_norm(t, dim=dims, keepdim=True) for t in (weight, drawn)]
        direction.append(drawn * lengths[0] / lengths[1])
    return direction


def direction_to(network: nn.Module, state: Mapping[str, Tensor]) -> Direction:
    """From the network's weights to those of a state dict: a step of 1 arrives there.

    Raises:
        ValueError: If the state has not these parameters, of these shapes.
    """
    direction = []
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            there = state.get(name)
            if there is None or there.shape != weight.shape:
                came = "none" if there is None else f"shape {tuple(there.shape)}"
                raise ValueError(f"the other solution must have {name} of shape {tuple(weight.shape)}, got {came}.")
            direction.append(there.to(weight) - weight.detach())
    return direction


def scan(
    network: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    directions: Sequence[Direction],
    axes: Sequence[Sequence[float]],
    path: Path,
    about: Mapping[str, Any],
    batch_norm: BatchNorm = "running",
) -> np.ndarray:
    r"""$L(w + \sum_k a_k d_k)$ at all points of a grid, with a progress bar.

    Every loss is kept in `path` when it is known: a scan that was stopped goes on behind its last point.

    Args:
        network: The network, afterwards as before.
        loss: The mean loss of a batch.
        batches: The data.
        directions: One for a line, two for a plane.
        axes: For each direction its steps a, in any order.
        path: The `.npz` file of the scan.
        about: What the scan is of, as JSON: another one in the same file is refused.
        batch_norm: What normalisation layers use, see `preserved_state`. Between two solutions `batch`: the running
            statistics of neither fit the weights between them.

    Returns:
        The losses, an axis per direction.

    Raises:
        ValueError: If the file is of another scan.

    Cost: no gradient; the loss once over all data for every point.

    What it does not tell: two directions of many thousands. A valley may be narrow in one that was not drawn.
    """
    identity = json.dumps({"axes": [list(map(float, axis)) for axis in axes], **about}, sort_keys=True)
    losses = np.full([len(axis) for axis in axes], np.nan)
    known = np.zeros(losses.shape, dtype=bool)
    if path.is_file():
        with np.load(path, allow_pickle=False) as file:
            if str(file["identity"]) != identity:
                raise ValueError(f"{path} is of another scan: {file['identity']}. Remove it, or write elsewhere.")
            losses, known = file["losses"], file["known"]
    todo = [point for point in np.ndindex(*losses.shape) if not known[point]]
    with objective_of(network, loss, batches, None, batch_norm, seed=0) as objective:
        for point in tqdm(
            todo, desc=path.stem, unit="point", initial=losses.size - len(todo), total=losses.size, disable=None
        ):
            steps = [axis[i] for axis, i in zip(axes, point, strict=True)]
            e = [
                torch.stack([a * part for a, part in zip(steps, parts, strict=True)]).sum(0)
                for parts in zip(*directions, strict=True)
            ]
            losses[point], known[point] = objective.value(e), True
            with replacing(path) as draft, draft.open("wb") as file:
                np.savez(file, identity=np.array(identity), losses=losses, known=known)
    return losses
