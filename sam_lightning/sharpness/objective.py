"""The loss that is measured: its value and its gradient over all data, in the scale's coordinates."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed, nn

from sam_lightning.optim.checks import check_integer
from sam_lightning.runs.threads import threads_for
from sam_lightning.sharpness.adaptive import Adaptive, real, units
from sam_lightning.sharpness.batches import HALF, samples_in, split, to_device, to_single_precision
from sam_lightning.sharpness.preserved_state import BatchNorm, preserved_state

Loss: TypeAlias = Callable[[Any], Tensor]  # the mean loss of a batch, 0-dimensional


@dataclass(frozen=True)
class Estimate:
    """A mean over random draws.

    Args:
        mean: The estimate.
        standard_error: Sample standard deviation over the square root of the number of draws.
    """

    mean: float
    standard_error: float

    @classmethod
    def of(cls, draws: Sequence[float]) -> "Estimate":
        """The estimate from independent draws, at least two."""
        return cls(fmean(draws), stdev(draws) / sqrt(len(draws)))


class Objective:
    r"""$L(w + T u) = \frac{1}{N} \sum_i \ell_i(w + T u)$ as a function of u, around the present weights w.

    w, u and gradients are lists of real tensors, one for every parameter with `requires_grad`; of a complex one its
    real and imaginary parts. It moves the network's weights, so it lives inside `preserved_state`.

    Args:
        network: The network; its weights are its parameters with `requires_grad`.
        loss: The mean loss of a batch.
        batches: The data of this process.
        T: The unit of every weight.
        joint: Whether the data of all processes are meant, or only these.

    Raises:
        ValueError: If there is no sample.
    """

    def __init__(self, network: nn.Module, loss: Loss, batches: Sequence[Any], T: list[Tensor], joint: bool) -> None:
        self.network = network
        self.T = T
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.weights = [real(parameter.detach()) for parameter in self.parameters]  # in the parameters' memory
        self.batches = batches
        self.joint = joint
        self._loss = loss
        self._origin: list[Tensor] | None = None  # a copy of w, once the weights move
        count = torch.tensor(sum(map(samples_in, batches)), device=self.weights[0].device)
        self.samples = int(self.sum_over_processes([count])[0])
        if not self.samples:
            raise ValueError("batches must hold at least one sample, got none: a loader that is used up, perhaps.")

    def of_batch(self, batch: Any) -> "Objective":
        """The loss of one batch alone, around the same weights."""
        self.move_to(None)
        part = Objective(self.network, self._loss, [batch], self.T, joint=False)
        part._origin = self._origin = self._origin or [weight.clone() for weight in self.weights]
        return part

    def batch_loss(self, batch: Any) -> Tensor:
        """The mean loss of a batch.

        Raises:
            TypeError: If it is not a 0-dimensional tensor.
        """
        loss = self._loss(batch)
        if not isinstance(loss, Tensor) or loss.ndim:
            came = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss(batch) must return the batch's mean loss, a 0-dimensional tensor, got {came}.")
        return loss

    def value(self, u: list[Tensor] | None = None) -> float:
        """L(w + T u); L(w) without u."""
        self.move_to(u)
        with torch.no_grad():
            total = sum(self.batch_loss(batch).double() * samples_in(batch) for batch in self.batches)
        return float(self.mean(total))

    def value_and_gradient(self, u: list[Tensor] | None = None) -> tuple[float, list[Tensor]]:
        """L(w + T u), and its gradient by u, which is T times the gradient by the weights."""
        self.move_to(u)
        total: Any = 0.0
        gradient = [torch.zeros_like(weight) for weight in self.weights]
        for batch in self.batches:
            loss = self.batch_loss(batch)
            parts = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            used = [(sum_, real(part)) for sum_, part in zip(gradient, parts, strict=True) if part is not None]
            if used:
                sums, found = (list(tensors) for tensors in zip(*used, strict=True))
                torch._foreach_add_(sums, found, alpha=samples_in(batch) / self.samples)
            total += loss.detach().double() * samples_in(batch)
        torch._foreach_mul_(self.sum_over_processes(gradient), self.T)
        return float(self.mean(total)), gradient

    def sum_over_processes(self, tensors: list[Tensor]) -> list[Tensor]:
        """Each tensor, summed over processes in place if the objective is joint."""
        if self.joint and distributed.is_available() and distributed.is_initialized():
            for tensor in tensors:
                distributed.all_reduce(tensor)
        return tensors

    def of_first_process(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, in place, if the objective is joint."""
        if self.joint and distributed.is_available() and distributed.is_initialized():
            distributed.broadcast(tensor, 0)
        return tensor

    def mean(self, total: Any) -> Tensor:
        """A sum over this process's samples, as the mean over all."""
        sum_ = torch.as_tensor(total, dtype=torch.float64, device=self.weights[0].device)
        return self.sum_over_processes([sum_])[0] / self.samples

    @torch.no_grad()
    def move_to(self, u: list[Tensor] | None) -> None:
        """Sets the weights to w + T u, or to w without u."""
        if self._origin is None:
            if u is None:
                return
            self._origin = [weight.clone() for weight in self.weights]
        torch._foreach_copy_(self.weights, self._origin)  # from w each time: steps would add up rounding
        if u is not None:
            torch._foreach_addcmul_(self.weights, self.T, [real(part) for part in u])


@contextmanager
def objective_of(
    network: nn.Module, loss: Loss, batches: Iterable[Any], scale: Adaptive | None, batch_norm: BatchNorm, seed: int
) -> Iterator[Objective]:
    """The objective of all processes' data; the network is as before when the context is left."""
    has_half = any(tensor.dtype in HALF for tensor in [*network.parameters(), *network.buffers()])
    with preserved_state(network, batch_norm, seed):
        T = units(network, scale)
        # Kept, so that every pass sees the same samples, whatever a loader shuffles or augments.
        kept = [to_device(batch, T[0].device) for batch in batches]
        if has_half:
            kept = [to_single_precision(batch) for batch in kept]
        objective = Objective(network, loss, kept, T, joint=True)
        with threads_for(_operations(objective)):
            yield objective


def _operations(objective: Objective) -> float:
    """Multiplications and additions of the loss of the first batch, if the host computes it with several threads."""
    if torch.get_num_threads() == 1 or not objective.batches or objective.weights[0].device.type != "cpu":
        return math.inf
    from torch.utils.flop_counter import FlopCounterMode  # half a second, for what needs it

    with torch.random.fork_rng([]), torch.no_grad(), FlopCounterMode(display=False) as counter:
        objective.batch_loss(objective.batches[0])
    return float(counter.get_total_flops())


def mean_over_parts(measure: Callable[[Objective], list[float]], objective: Objective, m: int | None) -> list[float]:
    """The measures of the whole data, or with `m` their mean over parts of m samples, each weighted by its samples.

    Raises:
        ValueError: If `m` is neither None nor an integer of at least 1.
    """
    if m is None:
        return measure(objective)
    check_integer("m", m, note=", or None for the whole data")
    total: Any = 0.0
    for batch in objective.batches:
        for part in split(batch, m):
            values = measure(objective.of_batch(part))
            total += samples_in(part) * torch.tensor(values, dtype=torch.float64)
    means: list[float] = objective.mean(total).tolist()
    return means
