"""A LightningModule that takes sharp steps by itself."""

import inspect
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from sam_lightning.optim import Params, RadiusSchedule
from sam_lightning.training.callback import SharpnessAwareTraining
from sam_lightning.training.methods import Method
from sam_lightning.training.sharding import shard
from sam_lightning.training.strategies import is_sharded

_FACTORIES = ("optimizer", "lr_scheduler")


class SharpnessAwareModule(LightningModule):
    """A LightningModule that trains with SAM, ASAM or another method, and is otherwise written like any other.

        class Regression(SharpnessAwareModule):
            method, rho = "ASAM", 0.5                          # SAM with its own rho, if not given

            def __init__(self):
                super().__init__()
                self.network = torch.nn.Linear(8, 1)

            def training_step(self, batch, batch_idx):
                x, y = batch
                return torch.nn.functional.mse_loss(self.network(x), y)

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

    It brings the callback `SharpnessAwareTraining` along, whose documentation says what happens in a step; a Trainer
    that has one of its own uses that one. As a base class beside another LightningModule it may stand first or last.

    The optimizer is what `configure_optimizers` makes: a plain one there is made sharp by `method`. A module that does
    not define it gets its optimizer from the factories below, as the command line gives them, and trains with exactly
    that one: plainly, if it is plain.

    Class attributes, each of which an argument or an instance's attribute may override, are `method`, `rho`,
    `second_pass`, `sync_perturbation`, `batch_norm_stats`, `micro_batches` and `radius`: the options of
    `SharpnessAwareTraining`.

    Args:
        optimizer: Makes the optimizer from `parameter_groups()`, by default the named parameters.
        lr_scheduler: Makes the learning rate scheduler from the optimizer. `ReduceLROnPlateau` looks at its `monitor`,
            or else at `val/loss`.
        lr_scheduler_interval: Whether the scheduler is stepped after every epoch or every step.
        micro_batches: Number of parts that each batch is cut into, to save memory.
        batch_norm_stats: The passes that update running statistics: the first only, or both.
        sync_perturbation: Whether all processes climb along their mean gradient.
        second_pass: `replay` or `fresh` random numbers in the second pass.
        radius: A schedule of the radius; in a configuration file `{class_path: sam_lightning.optim.late, init_args:
            {start: 0.9}}`.
    """

    # TorchScript compiles all other properties.
    __jit_unused_properties__: list[str] = [  # noqa: RUF012  # as LightningModule declares it
        *LightningModule.__jit_unused_properties__,
        "is_second_pass",
        "makes_optimizer_by_factory",
    ]
    method: ClassVar[Method] = "SAM"
    rho: float | None = None
    second_pass: Literal["replay", "fresh"] = "replay"
    sync_perturbation: bool = False
    batch_norm_stats: Literal["first", "both"] = "first"
    micro_batches: int = 1
    radius: ClassVar[RadiusSchedule | None] = None

    def __init__(
        self,
        *args: Any,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        micro_batches: int | None = None,
        batch_norm_stats: Literal["first", "both"] | None = None,
        sync_perturbation: bool | None = None,
        second_pass: Literal["replay", "fresh"] | None = None,
        radius: RadiusSchedule | None = None,
        **kwargs: Any,
    ) -> None:
        if lr_scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"lr_scheduler_interval must be 'epoch' or 'step', got {lr_scheduler_interval!r}.")
        options = {
            "micro_batches": micro_batches,
            "batch_norm_stats": batch_norm_stats,
            "sync_perturbation": sync_perturbation,
            "second_pass": second_pass,
            "radius": radius,
        }
        # The arguments of another module that stands behind may have these names; the factories are then its own. They
        # keep their names in this frame, from which `save_hyperparameters` reads them.
        theirs = _arguments_behind(type(self))
        given = {"optimizer": optimizer, "lr_scheduler": lr_scheduler, **options}
        handed_on = {name: value for name, value in given.items() if value is not None and name in theirs}
        super().__init__(*args, **kwargs, **handed_on)
        self.lr_scheduler_interval = lr_scheduler_interval
        self._make_optimizer = None if "optimizer" in theirs else optimizer
        self._make_lr_scheduler = None if "lr_scheduler" in theirs else lr_scheduler
        for name, value in options.items():
            if value is not None:
                setattr(self, name, value)
        self._callback()  # refuses wrong options where they are given

    @property
    def makes_optimizer_by_factory(self) -> bool:
        """Whether the optimizer is the factory's, and so exactly what was asked for."""
        overrides = type(self).configure_optimizers is not SharpnessAwareModule.configure_optimizers
        return self._make_optimizer is not None and not overrides

    def _callback(self) -> SharpnessAwareTraining:
        method, rho = (None, None) if self.makes_optimizer_by_factory else (self.method, self.rho)
        return SharpnessAwareTraining(
            method,
            rho=rho,
            second_pass=self.second_pass,
            sync_perturbation=self.sync_perturbation,
            batch_norm_stats=self.batch_norm_stats,
            micro_batches=self.micro_batches,
            radius=vars(self).get("radius", type(self).radius),  # a class's function would be bound
        )

    # Set by the Trainer before any hook is called: no hook that a subclass overrides could switch the steps off unseen.

    @property
    def trainer(self) -> Trainer:
        """The Trainer that the module is attached to."""
        trainer: Trainer = LightningModule.trainer.fget(self)  # type: ignore[attr-defined]
        return trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        LightningModule.trainer.fset(self, trainer)  # type: ignore[attr-defined]
        if not isinstance(trainer, Trainer) or trainer.lightning_module is not self:
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # of a part of the trainer
        # One that a module has brought along is of that module, or of options that it has no more.
        callbacks[:] = [callback for callback in callbacks if not getattr(callback, "is_a_modules", False)]
        if not any(isinstance(callback, SharpnessAwareTraining) for callback in callbacks):
            callbacks.insert(0, own := self._callback())
            own.is_a_modules = True  # type: ignore[attr-defined]

    @property
    def is_second_pass(self) -> bool:
        """Whether `training_step` runs at w + e, or is being measured: not once more for a batch of the training."""
        return "_is_measured" in vars(self) or vars(self).get("is_second_pass", False)

    # What a subclass may give.

    def parameter_groups(self) -> Params:
        """What the optimizer is made from; override it for groups, each with its own `rho` or `lr`."""
        return self.named_parameters()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and its scheduler if there is one, from the factories."""
        if self._make_optimizer is None:
            if super().configure_optimizers.__func__ is LightningModule.configure_optimizers:  # type: ignore[attr-defined]
                name = type(self).__name__
                raise TypeError(f"{name} needs an optimizer: define configure_optimizers, or give optimizer=.")
            return super().configure_optimizers()  # of another base class
        optimizer = self._make_optimizer(self.parameter_groups())
        if self._make_lr_scheduler is None:
            return optimizer
        scheduler = self._make_lr_scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": self.lr_scheduler_interval}
        if isinstance(scheduler, ReduceLROnPlateau):  # which looks at a metric, when there is a new one
            every = self._trainer.check_val_every_n_epoch if self._trainer is not None else 1
            config |= {"monitor": getattr(scheduler, "monitor", "val/loss"), "frequency": every or 1}
        return {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[return-value]

    def configure_model(self) -> None:
        """In ModelParallelStrategy shards every submodule by FSDP2, as `sharding.shard` does.

        Override it to cut your network in other places.
        """
        super().configure_model()
        if self._trainer is not None and is_sharded(self._trainer):
            assert self.device_mesh is not None
            for child in self.children():
                if any(True for _ in child.parameters()):
                    shard(child, self.device_mesh["data_parallel"])

    def save_hyperparameters(self, *args: Any, ignore: Any = None, frame: Any = None, **kwargs: Any) -> None:
        """As Lightning's, without functions that make optimizers and schedulers: no file could keep them."""
        if frame is None:
            current = inspect.currentframe()
            frame = None if current is None else current.f_back
        left_out: set[str] = set()
        theirs = _arguments_behind(type(self))
        if theirs:  # the module behind calls this, and does not know of our own arguments
            left_out |= inspect.signature(SharpnessAwareModule.__init__).parameters.keys() - theirs
        elif not args and type(self).configure_optimizers is SharpnessAwareModule.configure_optimizers:
            left_out |= {name for name in _FACTORIES if callable(frame and frame.f_locals.get(name))}
        if left_out:
            ignore = [*([ignore] if isinstance(ignore, str) else ignore or []), *sorted(left_out)]
        super().save_hyperparameters(*args, ignore=ignore, frame=frame, **kwargs)


def _arguments_behind(cls: type) -> set[str]:
    """Names of the arguments of the modules that stand behind `SharpnessAwareModule` among the bases of `cls`."""
    names: set[str] = set()
    kinds = cls.__mro__[cls.__mro__.index(SharpnessAwareModule) + 1 :]
    for kind in kinds[: kinds.index(LightningModule)]:
        own = vars(kind).get("__init__")
        parameters = inspect.signature(own).parameters if own is not None else {}
        names |= parameters.keys()
        if parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break  # it hands nothing on by name
    return names - {"self", "args", "kwargs"}
