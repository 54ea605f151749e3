"""All measures together, as they are kept with a run."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sam_lightning.sharpness.adaptive import Adaptive
from sam_lightning.sharpness.average_case import average_case_sharpness
from sam_lightning.sharpness.eigenvalues import largest_eigenvalues
from sam_lightning.sharpness.objective import Estimate, Loss
from sam_lightning.sharpness.preserved_state import BatchNorm
from sam_lightning.sharpness.trace import hessian_trace
from sam_lightning.sharpness.worst_case import worst_case_sharpness


@dataclass(frozen=True)
class Settings:
    """What is measured. The adaptive measures scale every weight by its own size: they ignore rescaled layers.

    Args:
        rho: Radius of the ball, plain.
        rho_adaptive: Radius of the ball in units of |w|.
        steps: Steps of the projected ascent.
        sigma: Standard deviation of the noise, plain.
        sigma_adaptive: Standard deviation of the noise in units of |w|.
        draws: Random draws of the trace and of the noise.
        m: Samples per part of the worst case and the largest eigenvalue; `None`: the whole data.
        batch_norm: What normalisation layers use: `running` statistics, or those of each `batch`.
        seed: Seed of every random number.
    """

    rho: float = 0.05
    rho_adaptive: float = 0.5
    steps: int = 20
    sigma: float = 0.01
    sigma_adaptive: float = 0.1
    draws: int = 30
    m: int | None = None
    batch_norm: BatchNorm = "running"
    seed: int = 0


@dataclass(frozen=True)
class Measures:
    """The measures of one scale.

    Args:
        largest_eigenvalue: Of the Hessian.
        trace: Of the Hessian.
        one_step: Worst case after one gradient step: what SAM, or ASAM, sees.
        worst_case: Worst case after `steps` steps.
        average_case: Mean rise under noise.
    """

    largest_eigenvalue: float
    trace: Estimate
    one_step: float
    worst_case: float
    average_case: Estimate


@dataclass(frozen=True)
class Sharpness:
    """What `measure` found.

    Args:
        plain: In the weights' own unit.
        adaptive: In units of |w|.
    """

    plain: Measures
    adaptive: Measures

    def rows(self) -> dict[str, tuple[float, float | None]]:
        """(value, standard error) by name: `worst_case`, `adaptive_worst_case`, and so on."""
        found: dict[str, tuple[float, float | None]] = {}
        for prefix, measures in (("", self.plain), ("adaptive_", self.adaptive)):
            for name, value in vars(measures).items():
                is_estimate = isinstance(value, Estimate)
                found[prefix + name] = (value.mean, value.standard_error) if is_estimate else (value, None)
        return found


def measure(network: nn.Module, loss: Loss, batches: Iterable[Any], settings: Settings | None = None) -> Sharpness:
    """Every measure of this package, plain and adaptive.

    Args:
        network: The network; its weights are its parameters with `requires_grad`, of one dtype.
        loss: The mean loss of a batch.
        batches: The data of this process.
        settings: What is measured; by default `Settings()`.

    Cost: with the defaults about 260 gradients over all data (the digits network).
    """
    batches = list(batches)
    settings = settings or Settings()
    plain = _measure(network, loss, batches, settings, None, settings.rho, settings.sigma)
    adaptive = _measure(network, loss, batches, settings, Adaptive(), settings.rho_adaptive, settings.sigma_adaptive)
    return Sharpness(plain, adaptive)


def _measure(
    network: nn.Module,
    loss: Loss,
    batches: list[Any],
    settings: Settings,
    scale: Adaptive | None,
    rho: float,
    sigma: float,
) -> Measures:
    m, norm, seed, draws = settings.m, settings.batch_norm, settings.seed, settings.draws
    return Measures(
        largest_eigenvalue=largest_eigenvalues(network, loss, batches, scale=scale, m=m, batch_norm=norm, seed=seed)[0],
        trace=hessian_trace(network, loss, batches, draws=draws, scale=scale, batch_norm=norm, seed=seed),
        one_step=worst_case_sharpness(network, loss, batches, rho=rho, scale=scale, m=m, batch_norm=norm, seed=seed),
        worst_case=worst_case_sharpness(
            network, loss, batches, rho=rho, steps=settings.steps, scale=scale, m=m, batch_norm=norm, seed=seed
        ),
        average_case=average_case_sharpness(
            network, loss, batches, sigma=sigma, draws=draws, scale=scale, batch_norm=norm, seed=seed
        ),
    )
