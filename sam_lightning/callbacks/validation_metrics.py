"""What a validation measured, by whatever names the module logs it."""

from lightning.pytorch import Trainer
from torch import Tensor


class ValidationMetrics:
    """Tells the metrics of a validation from all that was logged before it.

    A trainer's `callback_metrics` only ever grow, and names need not begin with `val`. What a validation logs is
    there afterwards as new tensors.
    """

    def __init__(self) -> None:
        self._before: dict[str, Tensor] = {}

    def start(self, trainer: Trainer) -> None:
        """To be called when a validation starts."""
        self._before = dict(trainer.callback_metrics)

    def end(self, trainer: Trainer) -> dict[str, float]:
        """To be called when it ends: what it logged, by name."""
        metrics = trainer.callback_metrics.items()
        return {name: float(value) for name, value in metrics if self._before.get(name) is not value}
