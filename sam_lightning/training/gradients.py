"""The gradients of a step: what they are scaled by, their norm, and those of batches that were accumulated before."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from sam_lightning.replay.attributes import with_prefixes
from sam_lightning.tensors import global_norm


class Gradients:
    """The gradients of the parameters that the trainer's optimizer has."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer = trainer
        self._module = module

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """What scales the loss in 16-mixed precision."""
        return getattr(self._trainer.precision_plugin, "scaler", None)

    def loss_scale(self) -> Tensor | float:
        """How many times the loss's own gradients they are; a wait for an accelerator is spared."""
        batches = self._trainer.accumulate_grad_batches
        if self.scaler is None:
            return 1 / batches
        return self.scaler.scale(torch.ones((), device=self._module.device)) / batches

    def norm(self) -> Tensor:
        """||g||, with loss scaling and accumulation undone."""
        return global_norm(self._all()) / self.loss_scale()

    def are_finite(self) -> Tensor:
        """Whether all of them are finite, as a 0-dimensional bool."""
        return global_norm(self._all()).isfinite()

    def set_aside(self) -> list[tuple[Tensor, Tensor]]:
        """Takes them away; copies where they are views of memory that is used again."""
        views = getattr(self._trainer.strategy.model, "gradient_as_bucket_view", False)
        kept = [(weight, weight.grad) for weight in self._weights() if weight.grad is not None]
        aside = [(weight, gradient.clone() if views else gradient) for weight, gradient in kept]
        for weight, _ in aside:
            weight.grad = None
        return aside

    @torch.no_grad()
    def add(self, aside: list[tuple[Tensor, Tensor]]) -> None:
        """Adds those that were set aside."""
        for weight, gradient in aside:
            if weight.grad is None:
                weight.grad = gradient
            else:
                weight.grad = gradient.add_(weight.grad)

    def of_others(self) -> list[tuple[Tensor, Tensor | None]]:
        """(parameter, copy of its gradient) of those that the optimizer does not have, and somebody else may step."""
        met = set(map(id, self._weights()))
        others = []
        for _, module in with_prefixes(self._module):
            for parameter in module._parameters.values():
                if parameter is not None and parameter.requires_grad and id(parameter) not in met:
                    met.add(id(parameter))
                    others.append(parameter)
        return [(p, None if p.grad is None else p.grad.clone()) for p in others]

    def must_stay(self) -> bool:
        """Whether a first pass that is not synchronised must leave gradients behind, though zero.

        DistributedDataParallel with find_unused_parameters=True still takes a parameter for used in the second pass if
        the first one used it, and fails where it then has no gradient.
        """
        return getattr(self._trainer.strategy.model, "find_unused_parameters", False)

    def _weights(self) -> list[Tensor]:
        return [weight for group in self._trainer.optimizers[0].param_groups for weight in group["params"]]

    def _all(self) -> list[Tensor]:
        return [weight.grad for weight in self._weights() if weight.grad is not None]
