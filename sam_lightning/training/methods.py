"""Which method is put around a module's optimizer."""

from functools import partial
from typing import Any, TypeAlias

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer

from sam_lightning import optim
from sam_lightning.optim import SAM, SharpnessAware

# The name first: the command line takes what it is given for the first that fits.
Method: TypeAlias = str | type[SharpnessAware] | partial[SharpnessAware]
Maker: TypeAlias = partial[SharpnessAware]  # of an optimizer, the module that made it, and options


def maker_of(method: Method | None) -> Maker | None:
    """What puts the method around an optimizer.

    Args:
        method: A class, its name, or a `functools.partial` of a class with options; `None`: nothing is put around it.

    Raises:
        ValueError: If it is none of these.
    """
    if method is None:
        return None
    keywords: dict[str, Any] = {}
    named: Any = getattr(optim, method.rpartition(".")[2], None) if isinstance(method, str) else method
    if isinstance(named, partial):
        named, keywords = named.func, dict(named.keywords)
    if not (isinstance(named, type) and issubclass(named, SharpnessAware)):
        names = sorted(n for n, v in vars(optim).items() if isinstance(v, type) and issubclass(v, SharpnessAware))
        known = ", ".join(name for name in names if name != "SharpnessAware")
        raise ValueError(f"method must be a sharpness-aware class, or one of {known}; got {method!r}.")
    return partial(_around, named, keywords)


def _around(
    cls: type[SharpnessAware],
    keywords: dict[str, Any],
    optimizer: Optimizer,
    module: LightningModule,
    options: dict[str, Any],
) -> SharpnessAware:
    return cls.around(optimizer, names=module, **{**keywords, **options})


def make_sharp(trainer: Trainer, module: LightningModule, maker: Maker | None, options: dict[str, Any]) -> Optimizer:
    """Puts the method around the trainer's optimizer; one that is sharpness-aware already stays as it is.

    Raises:
        TypeError: If there is no optimizer, or if its options were given in two places.
    """
    if not trainer.optimizers:
        raise TypeError(f"{type(module).__name__}.configure_optimizers makes no optimizer to train with.")
    optimizer = trainer.optimizers[0]
    if isinstance(optimizer, SharpnessAware):
        if options:
            raise TypeError(
                f"{type(module).__name__}.configure_optimizers makes a {type(optimizer).__name__} already, and "
                f"SharpnessAwareTraining was given {', '.join(options)}: give options in one place only."
            )
        asked = SharpnessAware if maker is None else maker.args[0]
        if asked is not SAM and not isinstance(optimizer, asked):  # SAM is what a callback asks for by default
            raise TypeError(
                f"{type(module).__name__}.configure_optimizers makes a {type(optimizer).__name__}, and "
                f"SharpnessAwareTraining was given {asked.__name__}: name the method in one place only."
            )
        return optimizer
    if maker is None:
        return optimizer
    trainer.optimizers = [sharp := maker(optimizer, module, options)]
    return sharp


def refuse_own_steps(module: LightningModule) -> None:
    """Refuses a module in manual optimization, with the recipe for it, and one that fetches its batches itself.

    Raises:
        TypeError: If it takes its steps itself, or if its `training_step` is given the loader's iterator.
    """
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise TypeError(
            f"{type(module).__name__}.training_step fetches its batches from dataloader_iter, so that a second pass "
            "would see another one: give it batch instead."
        )
    if not module.automatic_optimization:
        raise TypeError(
            f"{type(module).__name__} takes its steps itself (automatic_optimization is False), so that nothing could "
            "be put between them. In its training_step, run the second backward pass inside `with optimizer."
            "perturbed():` of a SAM optimizer that its configure_optimizers makes; remove SharpnessAwareTraining."
        )


def trained_weights(trainer: Trainer) -> list[Tensor]:
    """What the optimizer moves; parameters that do not require gradients may be among its own."""
    return [p for group in trainer.optimizers[0].param_groups for p in group["params"] if p.requires_grad]


def trains_plainly(module: LightningModule, trainer: Trainer) -> bool:
    """Whether neither the module nor a callback makes the steps sharp."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # of a part of the trainer
    sharp = [part for part in (module, *callbacks) if hasattr(part, "is_second_pass")]
    return module.automatic_optimization and not sharp
