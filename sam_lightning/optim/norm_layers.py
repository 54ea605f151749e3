"""SAM-ON: the parameters of normalisation layers alone are perturbed."""

from typing import Any

from torch import nn

NORM_LAYERS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,  # batch and instance normalisation, synchronised and lazy too
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def norm_layers_only(
    module: nn.Module, rho: float | None = None, layers: tuple[type[nn.Module], ...] = NORM_LAYERS
) -> list[dict[str, Any]]:
    r"""Two groups of named parameters: of normalisation layers with radius `rho`, and all others with 0.

    Any method perturbs then in the space of the former alone, with the norm over them alone, and trains both. In
    networks whose norm layers hold a small share of $\|g\|$ they move much further than under SAM at the same rho;
    the authors take 0.5 for SAM. No computation is saved.

    Args:
        module: The network.
        rho: Radius in the space of the normalisation layers' weights and biases, L2; by default the optimizer's.
        layers: The classes that count as normalisation layers.

    Raises:
        ValueError: If no such layer has parameters.

    Example:
        >>> import torch
        >>> from sam_lightning import SAM
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> optimizer = SAM(norm_layers_only(network, rho=0.5), torch.optim.SGD, lr=0.1)
        >>> [(group["param_names"], group["rho"]) for group in optimizer.param_groups]
        [(['1.weight', '1.bias'], 0.5), (['0.weight', '0.bias'], 0.0)]

    Reference:
        Mueller, Vlaar, Rolnick, Hein. Normalization Layers Are All That Sharpness-Aware Minimization Needs.
        NeurIPS 2023. arXiv 2306.04226.

    Differs from the paper's code in: layers are told by their class, not by "norm" or "bn" in their names.
    """
    inside = {p for layer in module.modules() if isinstance(layer, layers) for p in layer.parameters(recurse=False)}
    if not inside:
        raise ValueError(
            f"{type(module).__name__} has no normalisation layer with parameters: pass the classes of yours as layers."
        )
    named = list(module.named_parameters())
    groups: list[dict[str, Any]] = [{"params": [(n, p) for n, p in named if p in inside]}]
    if rho is not None:
        groups[0]["sam_rho"] = rho
    others = [(n, p) for n, p in named if p not in inside]
    return [*groups, {"params": others, "sam_rho": 0.0}] if others else groups
