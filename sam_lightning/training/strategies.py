"""Which distributed strategies sharpness-aware training works in: the others are refused before it starts."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
)
from lightning.pytorch.strategies.xla import XLAStrategy

from sam_lightning.optim import SharpnessAware
from sam_lightning.training.micro_batches import common_length

DDP = "DDPStrategy (--trainer.strategy ddp)"
FSDP2 = "ModelParallelStrategy(data_parallel_size=<processes>, tensor_parallel_size=1)"


class StrategyError(ValueError):
    """A strategy, or options with it, in which training would crash or silently go wrong."""


class StrategyCheck(Callback):
    """Refuses strategies that cannot work, and notes m, the number of samples that share a perturbation.

    `SharpnessAwareModule` brings it along: a callback and not hooks of the module, which a subclass could
    override and so switch off unseen. m is the module's `m_sharpness`, and goes to the loggers once.
    """

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuses what trains wrongly whatever the optimizer is, before the strategy wraps the module."""
        if stage == "fit":
            _refuse_strategy(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuses what depends on the module's options and its optimizer, which is made by now."""
        pl_module.m_sharpness = None
        if isinstance(trainer.strategy, DDPStrategy):
            _refuse_static_graph(trainer, pl_module)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            _refuse_partly_sharded(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Notes m, of the first batch: an incomplete last one has fewer samples."""
        samples = common_length(batch)
        if pl_module.m_sharpness is None and _climbs(trainer) and samples is not None:
            pl_module.m_sharpness = samples * (_shares(trainer) if pl_module.sync_perturbation else 1)
            for logger in trainer.loggers:
                logger.log_metrics({"m_sharpness": pl_module.m_sharpness}, step=trainer.global_step)


def _refuse_strategy(trainer: Trainer) -> None:
    strategy = trainer.strategy
    for refused, why, instead in (
        (FSDPStrategy, "FSDP1 holds the whole training step in its forward pass, where no backward pass runs", FSDP2),
        (DeepSpeedStrategy, "DeepSpeed keeps gradients and weights to itself, which are needed between passes", FSDP2),
        (XLAStrategy, "it averages gradients in the optimizer's step, behind the perturbation", DDP),
    ):
        if isinstance(strategy, refused):
            raise StrategyError(f"strategy {type(strategy).__name__} does not work here: {why}. Use {instead}.")
    if not isinstance(strategy, ModelParallelStrategy):
        return
    size = strategy.device_mesh["tensor_parallel"].size()
    if size > 1:
        raise StrategyError(
            f"tensor_parallel_size must be 1, got {size}: only data parallelism is supported. Use {FSDP2}."
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise StrategyError(
            "precision 16-mixed does not work in ModelParallelStrategy: each process would skip a step for "
            "overflows in its own shards only. Use bf16-mixed."
        )


def _refuse_static_graph(trainer: Trainer, module: Any) -> None:
    if not getattr(trainer.strategy.model, "static_graph", False):
        return
    for option, value, allowed, wrong in (
        ("sync_perturbation", module.sync_perturbation, True, _climbs(trainer) and not module.sync_perturbation),
        ("accumulate", module.accumulate, 1, module.accumulate > 1),
    ):
        if wrong:
            raise StrategyError(
                f"{option} must be {allowed} in DDPStrategy with static_graph=True, got {value}: such a graph "
                f"averages gradients in every backward pass. Set {option}={allowed}, or leave static_graph out."
            )


def _refuse_partly_sharded(trainer: Trainer, module: Any) -> None:
    if _shares(trainer) == 1:
        return
    if _climbs(trainer) and not module.sync_perturbation:
        raise StrategyError(
            "sync_perturbation must be True in ModelParallelStrategy, got False: the processes hold one sharded "
            f"copy of the weights, which can be in one place only. Set it, or use {DDP}, where each climbs by itself."
        )
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not hasattr(parameter, "to_local"):
            raise StrategyError(
                f"parameter {name} is not sharded, so that ModelParallelStrategy would not average its gradient. "
                "Put it into a submodule of the LightningModule, or shard it in configure_model."
            )


def _climbs(trainer: Trainer) -> bool:
    return any(isinstance(optimizer, SharpnessAware) for optimizer in trainer.optimizers)


def _shares(trainer: Trainer) -> int:
    """Into how many parts each step's samples are divided."""
    strategy = trainer.strategy
    shares: int = strategy.distributed_sampler_kwargs["num_replicas"] if isinstance(strategy, ParallelStrategy) else 1
    return shares
