"""A LightningModule as anybody writes it, its data, and its sharp training written out."""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from sam_lightning import SAM
from sam_lightning.training import SharpnessAwareModule, SharpnessAwareTraining

RHO = 0.05


@contextmanager
def float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def batches(**options) -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(32, n, generator=generator, dtype=torch.float64) for n in (4, 1))
    return DataLoader(TensorDataset(x, y), **{"batch_size": 8, **options})


def rows() -> DataLoader:
    return DataLoader([{"x": x, "y": y} for x, y in batches().dataset], batch_size=8)


class Plain(LightningModule):
    """Written for automatic optimization, and for nothing else."""

    def __init__(self, dropout=0.0, norm=False):
        super().__init__()
        torch.manual_seed(1)
        layers = [nn.Linear(4, 6), nn.BatchNorm1d(6) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(dropout)]
        self.net = nn.Sequential(*layers, nn.Linear(6, 1))
        self.double()

    def training_step(self, batch, batch_idx):
        return mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def sharp_loop(
    module: LightningModule,
    data: DataLoader,
    epochs: int = 1,
    rho: float = RHO,
    loss: Callable[[nn.Module, list], torch.Tensor] = lambda net, batch: mse_loss(net(batch[0]), batch[1]),
    clip: float | None = None,
    accumulate: int = 1,
) -> None:
    """SAM over `module.net` in plain PyTorch: the same random numbers, and the first pass's running statistics."""
    net, weights = module.net, [p for p in module.parameters() if p.requires_grad]
    optimizer = module.configure_optimizers()
    for _ in range(epochs):
        descends = [torch.zeros_like(w) for w in weights]
        for i, batch in enumerate(data):
            random = torch.get_rng_state()
            first = torch.autograd.grad(loss(net, batch), weights)
            after, buffers = torch.get_rng_state(), [b.clone() for b in net.buffers()]
            norm = torch.sqrt(sum(g.square().sum() for g in first))
            before = [w.detach().clone() for w in weights]
            with torch.no_grad():
                for w, g in zip(weights, first, strict=True):
                    w += rho * g / norm
            torch.set_rng_state(random)
            second = torch.autograd.grad(loss(net, batch), weights)
            torch.set_rng_state(after)
            with torch.no_grad():
                for target, value in [*zip(weights, before, strict=True), *zip(net.buffers(), buffers, strict=True)]:
                    target.copy_(value)
            descends = [d + g / accumulate for d, g in zip(descends, second, strict=True)]
            if (i + 1) % accumulate and i + 1 != len(data):
                continue
            for w, d in zip(weights, descends, strict=True):
                w.grad = d
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(weights, clip)
            optimizer.step()
            descends = [torch.zeros_like(w) for w in weights]


def distance(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of parameters and buffers of two modules."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max((x.double() - y.double()).abs().max().item() for x, y in pairs)


def sharp(trainer, module, data=None, epochs=1, method=SAM, val=None, callbacks=(), **options):
    """Trains `module` by the callback; what begins with a capital goes to it, the rest to the Trainer."""
    own = {key: options.pop(key) for key in ("second_pass", "micro_batches", "batch_norm_stats") if key in options}
    made = trainer(max_epochs=epochs, callbacks=[SharpnessAwareTraining(method, rho=RHO, **own), *callbacks], **options)
    torch.manual_seed(5)
    made.fit(module, data or batches(), val)
    return made


class SharpByBase(SharpnessAwareModule, Plain):
    rho = RHO


class SharpByMixin(Plain, SharpnessAwareModule):
    rho = RHO


class Once:
    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)
