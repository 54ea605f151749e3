"""All measures together, as they are kept with a run."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch import nn

from sam_lightning.sharpness.adaptive import Adaptive
from sam_lightning.sharpness.average_case import average_case_sharpness
from sam_lightning.sharpness.eigenvalues import largest_eigenvalues
from sam_lightning.sharpness.objective import Estimate, Loss
from sam_lightning.sharpness.preserved_state import BatchNorm
from sam_lightning.sharpness.trace import hessian_trace
from sam_lightning.sharpness.worst_case import worst_case_sharpness

Tell: TypeAlias = Callable[[str, float, float | None], object]


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
        scales = (("", self.plain), ("adaptive_", self.adaptive))
        return {prefix + name: _row(value) for prefix, measures in scales for name, value in vars(measures).items()}


def measure(
    network: nn.Module, loss: Loss, batches: Iterable[Any], settings: Settings | None = None, tell: Tell | None = None
) -> Sharpness:
    """Every measure of this package, plain and adaptive.

    Args:
        network: The network; its weights are its parameters with `requires_grad`, of one dtype.
        loss: The mean loss of a batch.
        batches: The data of this process.
        settings: What is measured; by default `Settings()`.
        tell: Called with each measure as soon as it is found: its name, value, and standard error or `None`.

    Cost: with the defaults about 260 gradients over all data (the digits network).
    """
    batches = list(batches)
    settings = settings or Settings()
    plain = _measure(network, loss, batches, settings, None, tell)
    adaptive = _measure(network, loss, batches, settings, Adaptive(), tell)
    return Sharpness(plain, adaptive)


def _measure(
    network: nn.Module,
    loss: Loss,
    batches: list[Any],
    settings: Settings,
    scale: Adaptive | None,
    tell: Tell | None,
) -> Measures:
    prefix = "adaptive_" if scale else ""
    rho, sigma = (settings.rho_adaptive, settings.sigma_adaptive) if scale else (settings.rho, settings.sigma)
    common: dict[str, Any] = {"scale": scale, "batch_norm": settings.batch_norm, "seed": settings.seed}
    largest = partial(largest_eigenvalues, m=settings.m)
    worst = partial(worst_case_sharpness, rho=rho, m=settings.m)
    measures: dict[str, Callable[..., Any]] = {
        "largest_eigenvalue": lambda *what, **how: largest(*what, **how)[0],
        "trace": partial(hessian_trace, draws=settings.draws),
        "one_step": worst,
        "worst_case": partial(worst, steps=settings.steps),
        "average_case": partial(average_case_sharpness, sigma=sigma, draws=settings.draws),
    }
    found = {}
    for name, of in measures.items():
        found[name] = of(network, loss, batches, **common)
        if tell:
            tell(prefix + name, *_row(found[name]))
    return Measures(**found)


def _row(value: float | Estimate) -> tuple[float, float | None]:
    return (value.mean, value.standard_error) if isinstance(value, Estimate) else (value, None)
