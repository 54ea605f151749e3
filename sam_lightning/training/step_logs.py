"""`self.log` of a module that runs twice per batch: heard in the first pass, silent in the second."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger


class StepLogs:
    """Stands in for the `log` of a module and of the LightningModules in it, while it trains.

    Attributes:
        names: What the module has logged so far, under the names that it gave.
    """

    def __init__(self, trainer: Trainer | None, module: LightningModule) -> None:
        self.names: set[str] = set()
        self._trainer = trainer
        self._is_silent = False
        self._averages: dict[str, tuple[Callable[..., None], float, dict[str, Any]]] | None = None
        self._share = 1.0
        # Told by what they can do: modules of pytorch_lightning are of another class.
        self._modules: list[Any] = [part for part in module.modules() if callable(getattr(part, "log_dict", None))]
        self._before = [vars(part).get("log") for part in self._modules]
        for part in self._modules:
            part.log = self._standing_in_for(part.log)

    def remove(self) -> None:
        """Gives the modules their own `log` back."""
        for part, log in zip(self._modules, self._before, strict=True):
            vars(part).pop("log", None)
            if log is not None:  # on the instance
                part.log = log
        self._modules, self._before = [], []

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Nothing is logged inside, neither by `self.log` nor by a logger of the trainer."""
        loggers = [] if self._trainer is None else self._trainer.loggers
        was_silent, self._is_silent = self._is_silent, True
        if self._trainer is not None:
            self._trainer.loggers = [DummyLogger() for _ in loggers]
        try:
            yield
        finally:
            self._is_silent = was_silent
            if self._trainer is not None:
                self._trainer.loggers = loggers

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """What is logged inside is not the module's own."""
        names = set(self.names)
        try:
            yield
        finally:
            self.names = names

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A number that is logged for every micro-batch inside is logged once, as the batch's mean."""
        self._averages = {}
        try:
            yield
            for name, (log, value, options) in self._averages.items():
                log(name, value, **options)
        finally:
            self._averages, self._share = None, 1.0

    def share(self, share: float) -> None:
        """What follows is of a micro-batch with this share of the batch's samples."""
        self._share = share

    def _standing_in_for(self, log: Callable[..., None]) -> Callable[..., None]:
        def logged(name: str, value: Any, *args: Any, **options: Any) -> None:
            if self._is_silent:
                return
            self.names.add(name)
            reduces = options.get("reduce_fx", "mean") not in ("mean", torch.mean)
            if self._averages is None or args or reduces or callable(value):  # a torchmetrics object averages by itself
                log(name, value, *args, **options)
                return
            before = self._averages[name][1] if name in self._averages else 0.0
            self._averages[name] = log, before + value * self._share, options

        return logged
