"""Image classification by cross entropy, the task of the studies."""

from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from sam_lightning.optim import Params, RadiusSchedule, norm_layers_only
from sam_lightning.training.module import SharpnessAwareModule

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W), labels (B,)


class SampleMean(Metric):
    """Mean over samples of batch means. Unlike torchmetrics' MeanMetric it keeps NaN, and never waits for a GPU."""

    total: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, mean: Tensor, samples: int) -> None:
        """Adds a batch of so many samples with this mean."""
        self.total += mean * samples
        self.samples += samples

    def compute(self) -> Tensor:
        """The mean so far."""
        return self.total / self.samples


class ImageClassifier(SharpnessAwareModule):
    """Trains a network on images by mean cross entropy and measures its accuracy.

    Logs `val/loss`, `val/accuracy`, `test/loss` and `test/accuracy` per epoch, besides what
    `SharpnessAwareModule` logs. Accuracy is a fraction; both losses are the mean over samples, without
    label smoothing, so that runs with different smoothing compare.

    Args:
        network: Maps images (B, C, H, W) to logits (B, K).
        optimizer: See `SharpnessAwareModule`, as all that follows but `label_smoothing`.
        lr_scheduler: Makes the learning rate scheduler from the optimizer.
        lr_scheduler_interval: Whether the scheduler is stepped after every epoch or every step.
        label_smoothing: Share of the target that is spread over all classes while training, in [0, 1).
        micro_batches: Number of parts that a batch is cut into, to save memory.
        batch_norm_stats: The passes that update running statistics.
        sync_perturbation: Whether all processes climb along their mean gradient.
        channels_last: Keeps weights and images with the channels innermost in memory, which convolutions on CPUs
            and in half precision on GPUs like better. Changes the last bits of results.
        norm_layers_only: Has the optimizer perturb normalisation layers alone (SAM-ON).
        radius: A schedule of the radius, such as `sam_lightning.optim.late`.
        compile_network: Has torch.compile make one program of the network, for up to minutes at the start of a training
            or evaluation; measures of sharpness run it as it is. Changes the last bits of results. `reduce-overhead`
            also replays it as a CUDA graph, so that a GPU does not wait for the host: for small networks, in trainings
            without accumulated gradients.

    Raises:
        ValueError: If a value is outside what is allowed, or gradients are accumulated with `reduce-overhead`.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        label_smoothing: float = 0.0,
        micro_batches: int = 1,
        batch_norm_stats: Literal["first", "both"] = "first",
        sync_perturbation: bool = False,
        channels_last: bool = False,
        norm_layers_only: bool | None = None,  # not False: a run that began before it existed goes on
        radius: RadiusSchedule | None = None,
        compile_network: bool | Literal["reduce-overhead"] = False,
    ) -> None:
        super().__init__(
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_scheduler_interval=lr_scheduler_interval,
            micro_batches=micro_batches,
            batch_norm_stats=batch_norm_stats,
            sync_perturbation=sync_perturbation,
            radius=radius,
        )
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing!r}.")
        self.channels_last = channels_last
        self.network = network.to(memory_format=torch.channels_last) if channels_last else network
        if compile_network not in (False, True, "reduce-overhead"):
            raise ValueError(f"compile_network must be true, false or reduce-overhead, got {compile_network!r}.")
        self._replays_a_graph = compile_network == "reduce-overhead"
        if compile_network:  # unlike torch.compile(network) this keeps the names in checkpoints
            self.network.compile(mode="reduce-overhead" if self._replays_a_graph else None)
        self.norm_layers_only = norm_layers_only
        self.label_smoothing = label_smoothing
        self.eval_loss = SampleMean()
        # Micro-averaged top 1 needs no number of classes; its checks of every batch would wait for the GPU.
        self.eval_accuracy = MulticlassAccuracy(average="micro", validate_args=False)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:  # a callback may accumulate from now on
        """Refuses to accumulate gradients that lie in the memory of a CUDA graph, which its next replay writes anew."""
        if self._replays_a_graph and (self.trainer.accumulate_grad_batches > 1 or self.micro_batches > 1):
            raise ValueError(
                "compile_network reduce-overhead does not accumulate gradients: set it to true, or "
                "trainer.accumulate_grad_batches and model.micro_batches to 1."
            )

    def parameter_groups(self) -> Params:
        """The named parameters; with `norm_layers_only` in two groups."""
        return norm_layers_only(self) if self.norm_layers_only else super().parameter_groups()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross entropy with label smoothing."""
        images, labels = batch
        return cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the validation metrics."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the validation metrics."""
        self._log_metrics("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the test metrics."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Logs the test metrics."""
        self._log_metrics("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Class probabilities (B, K)."""
        return self.forward(batch[0]).softmax(dim=1)

    def _evaluate(self, batch: Batch) -> None:
        images, labels = batch
        logits = self(images)
        self.eval_loss.update(cross_entropy(logits, labels), len(labels))
        self.eval_accuracy.update(logits, labels)

    def _log_metrics(self, stage: Literal["val", "test"]) -> None:
        metrics = {"loss": self.eval_loss, "accuracy": self.eval_accuracy}
        # One log per epoch and metric: the values are already reduced over batches and processes.
        for name, metric in metrics.items():
            self.log(f"{stage}/{name}", metric.compute(), prog_bar=True)
            metric.reset()
