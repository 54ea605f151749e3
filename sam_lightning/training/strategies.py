"""Which strategies sharpness-aware training works in, and when gradients are averaged over processes there."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from lightning.pytorch import LightningModule, Trainer
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sam_lightning.optim import SharpnessAware

DDP = "DDPStrategy (--trainer.strategy ddp)"
FSDP2 = "ModelParallelStrategy(data_parallel_size=<processes>, tensor_parallel_size=1)"


class StrategyError(ValueError):
    """A strategy, or options with it, in which training would crash or silently go wrong."""


def _is(strategy: object, name: str) -> bool:
    """By its name: the classes of pytorch_lightning are others than those of lightning.pytorch."""
    return any(kind.__name__ == name for kind in type(strategy).__mro__)


def is_sharded(trainer: Trainer) -> bool:
    """Whether weights are sharded by FSDP2."""
    return _is(trainer.strategy, "ModelParallelStrategy")


def data_parallel_size(trainer: Trainer) -> int:
    """Into how many parts each step's samples are divided."""
    options = getattr(trainer.strategy, "distributed_sampler_kwargs", None)
    size: int = options["num_replicas"] if options else 1
    return size


# When gradients are averaged.


def unsynchronised(trainer: Trainer) -> AbstractContextManager[None]:
    """Forward and backward inside leave each process its own gradient."""
    block = getattr(trainer.strategy, "block_backward_sync", None)
    return nullcontext() if block is None or trainer.strategy.model is None else block()


@contextmanager
def synchronised(trainer: Trainer) -> Iterator[None]:
    """Forward and backward inside average gradients over processes, also in a batch that is only accumulated."""
    model = trainer.strategy.model
    assert model is not None
    if isinstance(model, DistributedDataParallel):
        before, model.require_backward_grad_sync = model.require_backward_grad_sync, True
        try:
            yield
        finally:
            model.require_backward_grad_sync = before
        return
    if is_sharded(trainer) and trainer.fit_loop._should_accumulate():
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.set_requires_gradient_sync(True, recurse=False)
    yield


# What is refused.


def refuse_strategy(trainer: Trainer) -> None:
    """Refuses what trains wrongly whatever the optimizer is.

    Raises:
        StrategyError: With the reason, and a strategy that works.
    """
    strategy = trainer.strategy
    for refused, why, instead in (
        ("FSDPStrategy", "FSDP1 holds the whole training step in its forward pass, where no backward pass runs", FSDP2),
        (
            "DeepSpeedStrategy",
            "DeepSpeed keeps gradients and weights to itself, which are needed between passes",
            FSDP2,
        ),
        ("XLAStrategy", "it averages gradients in the optimizer's step, behind the perturbation", DDP),
    ):
        if _is(strategy, refused):
            raise StrategyError(f"strategy {type(strategy).__name__} does not work here: {why}. Use {instead}.")
    if not is_sharded(trainer):
        return
    size = strategy.device_mesh["tensor_parallel"].size()  # type: ignore[attr-defined]
    if size > 1:
        raise StrategyError(
            f"tensor_parallel_size must be 1, got {size}: only data parallelism is supported. Use {FSDP2}."
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise StrategyError(
            "precision 16-mixed does not work in ModelParallelStrategy: each process would skip a step for "
            "overflows in its own shards only. Use bf16-mixed."
        )


def refuse_options(
    trainer: Trainer, module: LightningModule, optimizer: Optimizer, sync_perturbation: bool, micro_batches: int
) -> None:
    """Refuses options that do not go with the strategy, when the optimizer has been made.

    Raises:
        StrategyError: With the option, its value, what is allowed, and why.
    """
    sharp = optimizer if isinstance(optimizer, SharpnessAware) else None
    perturbs = sharp is not None and sharp.needs_first_gradient
    if sharp is not None and sharp.needs_mean_gradient and not sync_perturbation and data_parallel_size(trainer) > 1:
        raise StrategyError(
            f"sync_perturbation must be True for {type(optimizer).__name__} in several processes, got False: it keeps "
            "or combines first gradients, which must be the same everywhere."
        )
    if getattr(trainer.strategy.model, "static_graph", False):
        for option, value, allowed, wrong in (
            ("sync_perturbation", sync_perturbation, True, perturbs and not sync_perturbation),
            ("micro_batches", micro_batches, 1, micro_batches > 1),
        ):
            if wrong:
                raise StrategyError(
                    f"{option} must be {allowed} in DDPStrategy with static_graph=True, got {value}: such a graph "
                    f"averages gradients in every backward pass. Set {option}={allowed}, or leave static_graph out."
                )
    if is_sharded(trainer) and data_parallel_size(trainer) > 1:
        _refuse_partly_sharded(module, perturbs and not sync_perturbation)


def _refuse_partly_sharded(module: LightningModule, climbs_alone: bool) -> None:
    if climbs_alone:
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
