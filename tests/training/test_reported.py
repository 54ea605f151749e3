"""What users of such packages have reported: unusual optimizers, layers and weights in one's own module."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.nn.functional import mse_loss

from plain_modules import Plain, batches
from regression import loader, make_network
from sam_lightning.callbacks.sharpness_monitor import SharpnessMonitor
from sam_lightning.training import SharpnessAwareTraining


class Of(LightningModule):
    """A network's regression by a torch optimizer."""

    def __init__(self, network=None, optimizer=torch.optim.SGD, **options):
        super().__init__()
        torch.manual_seed(0)
        self.net = network or make_network(norm=False)
        self._make = lambda: optimizer(self.parameters(), **options)

    def training_step(self, batch, batch_idx):
        return mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self._make()


def loss_scaling():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))


def clipped(trainer, method, fused):
    """The weights after five steps with clipping and loss scaling."""
    module, sharp = Of(lr=0.1, fused=fused), SharpnessAwareTraining(method)
    trainer(max_steps=5, plugins=loss_scaling(), gradient_clip_val=0.1, callbacks=[sharp]).fit(module, loader())
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_no_scaled_gradient_is_clipped(trainer):
    """Fused optimizers unscale within their step, after Lightning clips."""
    torch.testing.assert_close(clipped(trainer, "SAM", fused=True), clipped(trainer, "SAM", fused=False))
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        clipped(trainer, None, fused=True)


@pytest.mark.parametrize("scaling", [False, True])
def test_layers_that_are_made_by_the_first_batch(trainer, scaling):
    network = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(1))
    made = trainer(callbacks=[SharpnessAwareTraining("SAM")], plugins=loss_scaling() if scaling else None)
    made.fit(Of(network, lr=0.1), loader())
    assert made.global_step == 8
    assert network[1].num_batches_tracked == 8


class Complex(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(4, 1, dtype=torch.complex128))

    def training_step(self, batch, batch_idx):
        return mse_loss((batch[0].to(self.w.dtype) @ self.w).abs(), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_cosine_of_complex_gradients_is_that_of_their_parts(trainer):
    callbacks = [SharpnessAwareTraining("SAM", rho=0.5), SharpnessMonitor(0)]
    made = trainer(callbacks=callbacks, max_steps=1, log_every_n_steps=1)
    made.fit(Complex(), batches())
    module, batch = Complex(), next(iter(batches()))
    (first,) = torch.autograd.grad(module.training_step(batch, 0), [module.w])
    with torch.no_grad():
        module.w += 0.5 * first / first.norm()
    (second,) = torch.autograd.grad(module.training_step(batch, 0), [module.w])
    cosine = (first.conj() * second).real.sum() / first.norm() / second.norm()
    assert made.callback_metrics["train/grad_cosine"].item() == pytest.approx(cosine.item(), rel=1e-5)
    assert made.callback_metrics["train/perturbation_norm"].item() == pytest.approx(0.5, rel=1e-5)


def test_power_iterations_go_on_by_one_a_step(trainer):
    found = []
    for method in ("SAM", None):
        torch.manual_seed(0)
        network = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5))
        trainer(callbacks=[SharpnessAwareTraining(method, **({"rho": 0.5} if method else {}))]).fit(
            Of(nn.Sequential(network, nn.Linear(5, 1)), lr=0.0), loader()
        )
        found.append(network.parametrizations.weight[0]._u.clone())
    assert torch.equal(*found)


def test_an_optimizer_that_evaluates_by_itself_trains_plainly_and_is_no_base(trainer):
    module = Of(optimizer=torch.optim.LBFGS)
    trainer(callbacks=[SharpnessAwareTraining(None)]).fit(module, loader())
    with pytest.raises(TypeError, match="SAM cannot have LBFGS as its base"):
        trainer(callbacks=[SharpnessAwareTraining("SAM")]).fit(module, loader())


class Plateau(Plain):
    def __init__(self):
        super().__init__()
        self.rates = []

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        scheduler = {"scheduler": plateau, "monitor": "val", "frequency": 2}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def validation_step(self, batch, batch_idx):
        self.log("val", 1.0)

    def on_train_epoch_start(self):
        self.rates.append(self.optimizers().param_groups[0]["lr"])


def test_a_plateau_with_validation_in_every_second_epoch(trainer):
    rates = []
    for callbacks in ([], [SharpnessAwareTraining("SAM")]):
        module = Plateau()
        made = trainer(max_epochs=8, check_val_every_n_epoch=2, callbacks=callbacks)
        made.fit(module, batches(), batches())
        rates.append(module.rates)
    assert rates[0] == rates[1]
    assert rates[0][-1] < 0.1


def test_the_batch_size_finder_leaves_nothing_behind(trainer, tmp_path):
    class Sized(Of):
        batch_size = 2

        def train_dataloader(self):
            return loader(batch_size=self.batch_size)

    module = Sized(lr=0.1)
    before = module.net[0].weight.detach().clone()
    made = trainer(callbacks=[SharpnessAwareTraining("SAM")], default_root_dir=tmp_path)
    Tuner(made).scale_batch_size(module, max_trials=2, steps_per_trial=1)
    assert torch.equal(before, module.net[0].weight)
    assert not list(tmp_path.iterdir())
