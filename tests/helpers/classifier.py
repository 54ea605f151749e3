"""A small smooth classifier in float64, and its data."""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

SAMPLES = 23


class Classifier(nn.Module):
    """A smooth network with a frozen and an unused layer, and its mean loss."""

    def __init__(self, hidden=5, norm=False, dropout=0.0, seed=0):
        super().__init__()
        self.first = nn.Linear(4, hidden)
        self.norm = nn.BatchNorm1d(hidden) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.frozen = nn.Linear(hidden, hidden).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.last = nn.Linear(hidden, 3)
        self.double()
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.6, generator=generator)

    def forward(self, x):
        return self.last(self.dropout(torch.tanh(self.frozen(torch.tanh(self.norm(self.first(x)))))))

    def loss(self, batch):
        x, y = batch
        return cross_entropy(self(x), y)

    def trained(self):
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def of(self, batch):
        """The loss as a function of the trained weights."""
        x, y = batch
        return lambda weights: cross_entropy(
            functional_call(self, dict(zip(self.trained(), weights, strict=True)), x), y
        )


def data(samples=SAMPLES):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (samples,), generator=generator)


def batches(size, samples=SAMPLES):
    x, y = data(samples)
    return list(zip(x.split(size), y.split(size), strict=True))
