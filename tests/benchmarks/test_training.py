"""(c) Training by the command line against a bare loop; (e) study A's SAM arm against the paper's own way."""

import os
from functools import partial
from pathlib import Path
from statistics import median

import pytest
import torch
from alternating import DEVICE, clock
from lightning.pytorch import Callback
from published import PaperRun
from torch.nn.functional import cross_entropy

from sam_lightning import SAM, cli
from sam_lightning.data import CIFAR10
from sam_lightning.models import resnet18

pytestmark = [pytest.mark.benchmarks, pytest.mark.timeout(1800)]

CONFIGS = Path(__file__).parents[2] / "configs"
BATCHES, EPOCHS = 30, 5  # of each side; an epoch before them is a warm-up
CIFAR = pytest.mark.skipif("SAM_LIGHTNING_DATA" not in os.environ, reason="SAM_LIGHTNING_DATA names no CIFAR-10")


class InTurn(Callback):
    """Runs another epoch before each epoch of training, and takes the time of both, and of the epoch's checkpoints."""

    def __init__(self, other) -> None:
        self.other = other
        self.ours: list[float] = []
        self.others: list[float] = []
        self.checkpoints: list[float] = []

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch:
            self._end()
        prepared = self.other.prepare()
        begin = clock()
        self.other.run(prepared)
        self.others.append(clock() - begin)
        del prepared  # ends its workers, if it has some
        self.begin = clock()

    def on_train_epoch_end(self, trainer, pl_module):
        self.trained = clock()  # Lightning calls those that save checkpoints last

    def on_train_end(self, trainer, pl_module):
        self._end()

    def _end(self):
        end = clock()
        self.ours.append(end - self.begin)
        self.checkpoints.append(end - self.trained)


def fit_in_turn(other, folder, *words, batches=BATCHES, epochs=EPOCHS):
    """Epochs of study A's SAM arm by the command line, checkpoints and logs included, in turn with another's."""
    turns = InTurn(other)
    cli.main(
        [
            *("fit", "-c", str(CONFIGS / "base.yaml"), "-c", str(CONFIGS / "paper/ab.yaml")),
            *("--model.optimizer", str(CONFIGS / "optimizers/paper-sam.yaml"), "--trainer.limit_val_batches", "0"),
            *("--trainer.callbacks.monitor", "train/loss_epoch", "--trainer.callbacks.mode", "min"),
            *("--trainer.limit_train_batches", str(batches), "--trainer.max_epochs", str(epochs + 1)),
            *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
            *("--trainer.default_root_dir", str(folder), *words),
        ],
        callbacks=[turns],
    )
    return turns.ours[1:], turns.others[1:], turns.checkpoints[1:]


def recorded(compare, ours, others, name, other, bound, batches=BATCHES, **more):
    times = {name: partial(next, iter(ours)), other: partial(next, iter(others))}
    compare(len(ours), times, warmup=0, bound=bound, batches=batches, **more)


class BareLoop:
    """The same network, data and optimizer, without Lightning."""

    def __init__(self, batches):
        self.batches = batches
        self.data = CIFAR10(
            batch_size=128, validation="none", normalisation="half", random_crop=False, horizontal_flip=False
        )
        self.data.setup("fit")
        self.network = resnet18().to(DEVICE)
        sgd = partial(torch.optim.SGD, lr=0.01, weight_decay=5e-4)
        self.optimizer = SAM(self.network.named_parameters(), sgd, rho=0.05)

    def prepare(self):
        return self.data.train_dataloader()

    def run(self, loader):
        self.network.train()
        for _, (images, labels, _) in zip(range(self.batches), loader, strict=False):
            images, labels = self.data.normalise(images.to(DEVICE)), labels.to(DEVICE)
            self.optimizer.zero_grad()
            cross_entropy(self.network(images), labels).backward()
            with self.optimizer.perturbed():
                self.optimizer.zero_grad()
                cross_entropy(self.network(images), labels).backward()
            self.optimizer.step()


class Paper:
    def __init__(self):
        self.training = PaperRun(os.environ["SAM_LIGHTNING_DATA"], 128, rho=0.05, lr=0.01, device=DEVICE)

    def prepare(self):
        return self.training.batches()

    def run(self, batches):
        self.training.train(batches, BATCHES)


@CIFAR
def test_c_an_epoch_of_fit(compare, tmp_path):
    size = {"batches": 40}  # what an epoch costs beside its batches, such as a checkpoint, weighs less in a whole one
    ours, others, checkpoints = fit_in_turn(BareLoop(**size), tmp_path, epochs=6, **size)
    trained = [(a - saved) / b for a, b, saved in zip(ours, others, checkpoints, strict=True)]
    more = {"checkpoints": median(checkpoints), "without_checkpoints": median(trained)}
    recorded(compare, ours, others, "fit", "bare loop", 1.02, **size, **more)


@CIFAR
@pytest.mark.parametrize(
    ("name", "words", "bound"),
    [
        ("float32, as the study runs", [], 0.80),
        ("float32, channels last", ["--model.channels_last", "true"], 0.80),
        ("bfloat16, channels last", ["--model.channels_last", "true", "--trainer.precision", "bf16-mixed"], 0.50),
    ],
)
def test_e_study_a(compare, tmp_path, name, words, bound):
    ours, others, _ = fit_in_turn(Paper(), tmp_path, *words)
    recorded(compare, ours, others, name, "the paper's way", bound)
