"""(d) Our batches against torchvision's; their share of a step follows from (a)."""

import os
import time

import pytest
import torch
import torchvision
from alternating import DEVICE, clock
from torchvision import transforms

from sam_lightning.data import CIFAR10

pytestmark = [pytest.mark.benchmarks, pytest.mark.timeout(1800)]

BATCHES = 40


@pytest.mark.skipif("SAM_LIGHTNING_DATA" not in os.environ, reason="SAM_LIGHTNING_DATA names no CIFAR-10")
@pytest.mark.parametrize("augmented", [False, True])
def test_d_batches(compare, augmented):
    data = CIFAR10(batch_size=128, validation="none", random_crop=augmented, horizontal_flip=augmented)
    data.setup("fit")
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()] if augmented else []
    steps = [*augment, transforms.ToTensor(), transforms.Normalize(CIFAR10.mean, CIFAR10.std)]
    theirs = torchvision.datasets.CIFAR10(os.environ["SAM_LIGHTNING_DATA"], transform=transforms.Compose(steps))
    loader = torch.utils.data.DataLoader(theirs, 128, shuffle=True, num_workers=2)
    mine, batches = iter(data.train_dataloader()), iter(loader)  # an epoch is enough for all rounds

    def ours():
        time.sleep(0.3)  # until torchvision's workers have fetched ahead what they may, and rest
        begin = clock()
        for _ in range(BATCHES):
            images, _, samples = (part.to(DEVICE) for part in next(mine))
            data.normalise(data._augment(images, samples, epoch=0))
        return clock() - begin

    def torchvisions():
        for _ in range(4):  # what 2 workers have fetched ahead is not counted
            next(batches)
        begin = clock()
        for _ in range(BATCHES):
            images, labels = next(batches)
            images.to(DEVICE), labels.to(DEVICE)
        return clock() - begin

    compare(7, {"ours": ours, "torchvision, 2 workers": torchvisions}, warmup=1, bound=0.1, batches=BATCHES)
