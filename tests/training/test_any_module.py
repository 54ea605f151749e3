"""Modules as people write them take sharp steps unedited, by either door; what cannot is refused."""

import pickle
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from plain_modules import RHO, Once, Plain, SharpByBase, SharpByMixin, batches, distance, sharp, sharp_loop
from sam_lightning import ASAM, SAM
from sam_lightning.optim import late
from sam_lightning.training import SharpnessAwareModule, SharpnessAwareTraining


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_unedited_module_equals_the_written_out_loop(trainer, clip, accumulate):
    module, expected = Plain(norm=True, dropout=0.3), Plain(norm=True, dropout=0.3)
    made = sharp(trainer, module, epochs=2, gradient_clip_val=clip, accumulate_grad_batches=accumulate)
    torch.manual_seed(5)
    sharp_loop(expected, batches(), epochs=2, clip=clip, accumulate=accumulate)
    assert distance(module, expected) < 1e-14
    assert made.global_step == 2 * -(-4 // accumulate)
    assert module.state_dict().keys() == Plain(norm=True).state_dict().keys()


@pytest.mark.parametrize("base", [SharpByBase, SharpByMixin])
def test_both_doors_lead_to_the_same_weights(trainer, base):
    module, other = base(norm=True), Plain(norm=True)
    torch.manual_seed(5)
    trainer().fit(module, batches())
    sharp(trainer, other)
    assert distance(module, other) == 0


def test_a_librarys_module_with_arguments_may_be_mixed_in_any_order(trainer):
    class Task(LightningModule):
        def __init__(self, width, optimizer="sgd"):
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Linear(4, width).double()

        def training_step(self, batch, batch_idx):
            return mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class First(SharpnessAwareModule, Task):
        pass

    class Last(Task, SharpnessAwareModule):
        pass

    for kind in (First, Last):
        module = kind(width=1, optimizer="adam")
        assert module.hparams.optimizer == "adam"
        made = trainer()
        made.fit(module, batches())
        assert type(made.optimizers[0]) is SAM


def test_a_librarys_argument_that_is_handed_on_by_name_reaches_it():
    class Library(LightningModule):
        def __init__(self, optimizer="adam"):
            super().__init__()
            self.chosen = optimizer

    class Model(Library):
        def __init__(self, width=1, **kwargs):
            super().__init__(**kwargs)

    class Mixed(SharpnessAwareModule, Model):
        pass

    assert Mixed(width=2, optimizer="sgd").chosen == "sgd"


def test_a_module_that_makes_its_optimizer_of_a_hyperparameter_keeps_it(trainer):
    class Template(SharpnessAwareModule):
        def __init__(self, optimizer):
            super().__init__()
            self.save_hyperparameters(logger=False)
            self.net = nn.Linear(4, 1).double()

        training_step = Plain.training_step

        def configure_optimizers(self):
            return self.hparams.optimizer(params=self.parameters())

    made = trainer()
    made.fit(Template(partial(torch.optim.SGD, lr=0.1)), batches())
    assert type(made.optimizers[0]) is SAM


def test_a_step_from_a_mixin_in_front_is_taken_sharply(trainer):
    class Step:
        def training_step(self, batch, batch_idx):
            return mse_loss(self.net(batch[0]), batch[1])

    class Mine(Step, SharpByBase):
        pass

    module, expected = Mine(), Plain()
    trainer().fit(module, batches())
    sharp_loop(expected, batches())
    assert distance(module, expected) < 1e-14


@pytest.mark.parametrize("method", [SAM, "SAM", "sam_lightning.SAM", partial(SAM, rho=RHO)])
def test_a_method_is_a_class_a_name_or_a_partial(trainer, method):
    module, expected = Plain(), Plain()
    trainer(callbacks=[SharpnessAwareTraining(method, **({} if isinstance(method, partial) else {"rho": RHO}))]).fit(
        module, batches()
    )
    sharp_loop(expected, batches())
    assert distance(module, expected) < 1e-14


def test_options_of_the_method_reach_it(trainer):
    made = sharp(trainer, Plain(), method=partial(ASAM, eta=0.5))
    assert made.optimizers[0].eta == 0.5
    with pytest.raises(ValueError, match=r"method must be a .* class, or one of .*ASAM.*'SAMM'"):
        SharpnessAwareTraining("SAMM")


def test_logs_are_those_of_the_first_pass(trainer, tmp_path):
    class Logging(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train/loss", loss, on_step=True, on_epoch=True)
            self.log("mine", loss)
            if self.logger:
                self.logger.log_metrics({"direct": loss.item()}, step=self.global_step)
            return loss

    rows = []
    for callbacks in ([], [SharpnessAwareTraining(SAM, rho=RHO)]):
        logger = CSVLogger(tmp_path, version=len(rows))
        made = trainer(logger=logger, callbacks=callbacks, log_every_n_steps=1, max_epochs=60)
        made.fit(Logging(), batches())
        rows.append((set(made.callback_metrics), len(logger.experiment.metrics_keys), made.logged_metrics))
    added = rows[1][0] - rows[0][0]
    assert added == {"train/loss_perturbed", "train/grad_norm", "lr"}
    assert {"train/loss_step", "train/loss_epoch", "mine"} <= rows[0][0] & rows[1][0]


def test_no_name_of_the_module_is_taken(trainer):
    class Names(SharpByMixin):
        def __init__(self):
            super().__init__()
            self.loss = nn.MSELoss()
            self._scaler = self._clip = self._backward = self._logs = self._step = "mine"
            self.accumulate = self.optimizer = self.result = 3

        def _log_step(self, name, value):
            self.log(name, value)

        def training_step(self, batch, batch_idx):
            return self.loss(self.net(batch[0]), batch[1])

    module, expected = Names(), Plain()
    trainer().fit(module, batches())
    sharp_loop(expected, batches())
    assert distance(module, expected) < 1e-14


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # Lightning's own, once a process
def test_a_step_may_return_nothing(trainer):
    class Skipping(Plain):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    module, expected = Skipping(), Plain()
    made = sharp(trainer, module)
    plain = trainer()
    plain.fit(Skipping(), batches())
    assert made.global_step == plain.global_step
    sharp_loop(expected, [batch for i, batch in enumerate(batches()) if i % 2 == 0])
    assert distance(module, expected) < 1e-14


def test_a_step_without_an_index(trainer):
    class Short(Plain):
        def training_step(self, batch):
            return mse_loss(self.net(batch[0]), batch[1])

    module, expected = Short(), Plain()
    sharp(trainer, module)
    sharp_loop(expected, batches())
    assert distance(module, expected) < 1e-14


def test_a_number_logged_in_micro_batches_is_the_batchs_mean(trainer):
    class Logging(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("mine", loss)
            return loss

    made = sharp(trainer, Logging(), micro_batches=2, limit_train_batches=1, log_every_n_steps=1)
    expected = Plain().training_step(next(iter(batches())), 0).item()
    assert made.callback_metrics["mine"].item() == pytest.approx(expected, rel=1e-6)
    assert made.callback_metrics["train/loss"].item() == pytest.approx(expected, rel=1e-6)


# What cannot be made sharp.


def test_a_module_that_steps_by_itself_is_refused_with_the_recipe(trainer):
    class Manual(Plain):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(TypeError, match=r"Manual takes its steps itself .* `with optimizer.perturbed\(\):`"):
        sharp(trainer, Manual())


def test_a_module_that_fetches_its_batches_itself_is_refused(trainer):
    class Fetching(Plain):
        def training_step(self, dataloader_iter):
            return super().training_step(next(dataloader_iter)[0], 0)

    with pytest.raises(TypeError, match=r"Fetching.training_step fetches its batches from dataloader_iter"):
        sharp(trainer, Fetching())


def test_options_of_the_module_are_the_classs_or_the_instances(trainer):
    class Late(SharpByMixin):
        radius = late(1.0)

    class LateInstance(SharpByMixin):
        def __init__(self):
            super().__init__()
            self.radius, self.method, self.rho = late(1.0), "ASAM", 0.3
            self.micro_batches, self.second_pass, self.sync_perturbation = 2, "fresh", True

    for module, method in ((Late(), "SAM"), (LateInstance(), "ASAM")):
        made = trainer()
        made.fit(module, batches())
        (optimizer,) = made.optimizers
        assert type(optimizer).__name__ == method
        assert optimizer.param_groups[0]["rho"] == 0
        assert optimizer.param_groups[0]["initial_rho"] == (RHO if method == "SAM" else 0.3)
    callback = made.callbacks[0]
    assert (callback.micro_batches, callback.second_pass, callback.sync_perturbation) == (2, "fresh", True)


def test_options_in_two_places_are_refused(trainer):
    class Made(Plain):
        def configure_optimizers(self):
            return SAM(self.parameters(), torch.optim.SGD, lr=0.1, rho=0.3)

    with pytest.raises(TypeError, match="makes a SAM already, and SharpnessAwareTraining was given rho"):
        sharp(trainer, Made())
    made = trainer(callbacks=[SharpnessAwareTraining()])
    made.fit(Made(), batches())
    assert made.optimizers[0].param_groups[0]["rho"] == 0.3
    with pytest.raises(ValueError, match="a Trainer takes one SharpnessAwareTraining"):
        trainer(callbacks=[SharpnessAwareTraining(), type("Other", (SharpnessAwareTraining,), {})()]).fit(
            Plain(), batches()
        )


def test_frozen_parameters_may_hold_what_they_like(trainer):
    class Masked(Plain):
        def __init__(self, value):
            super().__init__()
            self.mask = nn.Parameter(torch.full((4, 4), value).triu(1), requires_grad=False)

    for value in (float("-inf"), -1e30):
        assert sharp(trainer, Masked(value)).global_step == 4


def test_afterwards_module_and_trainer_are_as_before(trainer):
    module = Plain()
    made = sharp(trainer, module)
    assert not {"log", "is_second_pass"} & vars(module).keys()
    assert "_make_closure" not in vars(made.fit_loop.epoch_loop.automatic_optimization)
    assert not module._state_dict_pre_hooks


def test_parts_may_have_weights_of_their_own_in_the_loss(trainer):
    """Padding, which cross entropy leaves out of its mean, makes shares by samples wrong."""

    class Tokens(Plain):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3).double()
            nn.init.eye_(self.net.weight)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    class Weighted(Tokens):
        def split_batch(self, batch, count):
            labels = [y for y in batch[1].chunk(count)]
            total = (batch[1] >= 0).sum()
            return [
                ((x, y), ((y >= 0).sum() / total).item()) for x, y in zip(batch[0].chunk(count), labels, strict=True)
            ]

    x = next(iter(batches()))[0]
    data = DataLoader(TensorDataset(x, torch.tensor([0, -100, -100, -100, 1, 2, 0, 1])), batch_size=8)
    whole, wrong, right = Tokens(), Tokens(), Weighted()
    for module, parts in ((whole, 1), (wrong, 2), (right, 2)):
        module.net.bias.data.zero_()
        sharp(trainer, module, data, micro_batches=parts)
    assert distance(whole, right) < 1e-7  # shares are single precision numbers
    assert distance(whole, wrong) > 1e-3


def test_a_sharp_module_is_exported_as_any_other():
    class Own(SharpByMixin):
        def forward(self, x):
            return self.net(x)

    module, x = Own(), torch.randn(2, 4, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        assert torch.equal(module.to_torchscript()(x), module(x))


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_a_batch_of_nothing_has_no_loss(trainer):
    first, second, *_ = batches()
    made = sharp(trainer, frozen := Plain(), Once(first, None, None, second), log_every_n_steps=1)
    twin = Plain()
    sharp_loop(twin, [first])
    losses = [Plain().training_step(first, 0).item(), twin.training_step(second, 0).item()]
    assert made.callback_metrics["train/loss_epoch"].item() == pytest.approx(sum(losses) / 2)
    assert distance(frozen, twin) > 0


def test_hyperparameters_of_a_librarys_module_are_its_own():
    class Library(LightningModule):
        def __init__(self, width=1, optimizer="adam"):
            super().__init__()
            self.save_hyperparameters()

    class Mixed(SharpnessAwareModule, Library):
        pass

    assert dict(Mixed(width=2, optimizer="sgd").hparams) == {"width": 2, "optimizer": "sgd"}
    make = partial(torch.optim.SGD, lr=0.1)
    assert Mixed(optimizer=make).hparams["optimizer"] is make


def test_a_trainer_takes_one_module_after_another(trainer):
    class Other(SharpByMixin):
        method, rho = "ASAM", 0.7

    made = trainer()
    for module, method in ((SharpByMixin(), "SAM"), (Other(), "ASAM"), (SharpByMixin(), "SAM")):
        made.fit(module, batches())
        assert type(made.optimizers[0]).__name__ == method
    assert sum(isinstance(callback, SharpnessAwareTraining) for callback in made.callbacks) == 1


def test_one_callback_serves_many_trainings(trainer):
    callback = SharpnessAwareTraining(SAM, rho=RHO)
    for _ in range(2):
        module, expected = Plain(), Plain()
        trainer(callbacks=[callback]).fit(module, batches())
        sharp_loop(expected, batches())
        assert distance(module, expected) < 1e-14
        assert not {"log", "is_second_pass"} & vars(module).keys()


def test_sums_and_extremes_of_micro_batches_are_not_averaged(trainer):
    class Logging(Plain):
        def training_step(self, batch, batch_idx):
            self.log("samples", float(len(batch[0])), reduce_fx="sum", on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    for micro_batches in (1, 2):
        made = sharp(trainer, Logging(), micro_batches=micro_batches)
        assert made.callback_metrics["samples"] == 32


@pytest.mark.parametrize("method", [SAM, "ASAM", partial(SAM, rho=RHO)])
def test_the_callback_can_be_pickled(method):
    """As Trainers that spawn their processes do."""
    copied = pickle.loads(pickle.dumps(SharpnessAwareTraining(method)))
    assert copied.state_dict() == {"loss_sum": 0.0, "batches": 0}


def test_another_method_than_the_modules_is_refused(trainer):
    class Made(Plain):
        def configure_optimizers(self):
            return SAM(self.parameters(), torch.optim.SGD, lr=0.1, rho=0.3)

    with pytest.raises(TypeError, match="makes a SAM, and SharpnessAwareTraining was given ASAM"):
        trainer(callbacks=[SharpnessAwareTraining("ASAM")]).fit(Made(), batches())


def test_a_failed_epochs_losses_are_not_the_next_trainings(trainer):
    class Failing(Plain):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise InterruptedError
            return super().training_step(batch, batch_idx)

    callback = SharpnessAwareTraining(SAM, rho=RHO)
    with pytest.raises(InterruptedError):
        trainer(callbacks=[callback]).fit(Failing(), batches())
    found = []
    for used in (callback, SharpnessAwareTraining(SAM, rho=RHO)):
        made = trainer(callbacks=[used])
        made.fit(Plain(), batches())
        found.append(made.callback_metrics["train/loss_epoch"].item())
    assert found[0] == found[1]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_logged_is_free_of_scales(trainer, accumulate):
    """Of the loss scaler's, and of the number of accumulated batches."""
    found = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))]):
        for plugin in plugins:
            plugin.forward_context = lambda: torch.autocast("cpu", enabled=False)
        made = sharp(
            trainer,
            Plain(),
            plugins=plugins,
            accumulate_grad_batches=accumulate,
            log_every_n_steps=1,
            limit_train_batches=accumulate,
        )
        found.append(
            [made.callback_metrics[f"train/{name}"].item() for name in ("loss", "loss_perturbed", "grad_norm")]
        )
    network = Plain()
    x, y = list(batches())[accumulate - 1]
    loss = mse_loss(network.net(x), y)
    gradient = torch.autograd.grad(loss, list(network.parameters()))
    norm = torch.sqrt(sum(g.square().sum() for g in gradient)).item()
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert (found[0][0], found[0][2]) == pytest.approx((loss.item(), norm), rel=1e-5)
    assert found[0][1] > found[0][0]
