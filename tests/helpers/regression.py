"""A small regression with batch normalisation, and the loop that the module is compared with."""

from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from sam_lightning import SAM
from sam_lightning.data.loader import BatchLoader
from sam_lightning.data.sampler import EpochSampler
from sam_lightning.replay.batch_norm import frozen_running_stats
from sam_lightning.training import SharpnessAwareModule

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)
SAM_SGD = partial(SAM, base=SGD, rho=0.1)


def make_network(norm: bool = True, dropout: float = 0.0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(1)
    layers = [nn.Linear(6, 12), nn.BatchNorm1d(12) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(dropout)]
    network = nn.Sequential(*layers, nn.Linear(12, 1))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return network


class Branches(nn.Module):
    """A network with a second branch, which it takes or not."""

    def __init__(self):
        super().__init__()
        self.takes_second = True
        self.trunk, self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 1), nn.Linear(12, 1)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4, generator=generator)

    def forward(self, x):
        hidden = torch.tanh(self.trunk(x))
        return self.first(hidden) + (self.second(hidden) if self.takes_second else 0)


class Tied(nn.Module):
    """A list of layers, one of which shares its weight with the last, and a parameter of the network's own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.tail = nn.Linear(6, 6, bias=False)
        self.tail.weight = self.layers[0].weight
        self.scale = nn.Parameter(torch.ones(1))
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4, generator=generator)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.tail(x).mean(1, keepdim=True) * self.scale


def make_data(samples: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(samples, 6, generator=generator)
    return TensorDataset(x, x.square().sum(1, keepdim=True) / 6)


def loader(batch_size: int = 8, samples: int = 64, **options) -> DataLoader:
    return DataLoader(make_data(samples), batch_size=batch_size, **options)


class Batched(TensorDataset):
    """Fetched by whole batches."""

    def __getitems__(self, positions):
        return tuple(tensor[positions] for tensor in self.tensors)


def resumable(workers: int = 0) -> BatchLoader:
    """Shuffled batches of 8 that can be resumed within an epoch."""
    data = Batched(*make_data().tensors)
    return BatchLoader(data, 8, EpochSampler(data, seed=5, shuffle=True), num_workers=workers)


class Regression(SharpnessAwareModule):
    def __init__(self, optimizer=SAM_SGD, network: nn.Module | None = None, **options):
        super().__init__(optimizer=optimizer, **options)
        self.network = network or make_network()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return mse_loss(self.network(x), y)


def bare_loop(network, optimizer, batches, both=False, clip=None, micro=1):
    """Written-out training: `optimizer` may be sharpness-aware or plain; returns the first-pass losses."""
    losses = []
    for x, y in batches:

        def backward(x=x, y=y):
            total = 0.0
            for xs, ys in zip(torch.tensor_split(x, micro), torch.tensor_split(y, micro), strict=True):
                loss = mse_loss(network(xs), ys) * (len(xs) / len(x))
                loss.backward()
                total += loss.item()
            return total

        optimizer.zero_grad()
        losses.append(backward())
        if hasattr(optimizer, "perturbed"):
            with optimizer.perturbed(), nullcontext() if both else frozen_running_stats(network):
                optimizer.zero_grad()
                backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
    return losses


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Equal bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
