"""Modules as people write them take sharp steps unedited: the same function twice, and no trace of the second pass."""

import copy
import pickle
import random
import warnings
from collections import Counter, OrderedDict, defaultdict
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAccuracy

from plain_modules import RHO, Plain, batches, distance, rows, sharp_loop
from sam_lightning import ASAM, SAM
from sam_lightning.optim import late, mutable_values
from sam_lightning.training import SharpnessAwareModule, SharpnessAwareTraining


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


# The second pass is the same function.


def test_noise_is_the_same_in_both_passes(trainer):
    """With other noise in the second pass, L(w + e) - L(w) is negative in a third of the steps."""
    rises = []

    class Noisy(Plain):
        def training_step(self, batch, batch_idx):
            noise = torch.randn(()) + np.random.randn() + random.gauss(0, 1)
            loss = super().training_step((batch[0] + noise, batch[1]), batch_idx)
            seen.append((loss.item(), noise.item()))
            return loss

        def on_train_batch_end(self, outputs, batch, batch_idx):
            rises.append(seen[-1][0] - seen[-2][0])
            draws.append([noise for _, noise in seen[-2:]])

    seen, draws = [], []
    sharp(trainer, Noisy(dropout=0.5), epochs=5)
    assert min(rises) > 0
    assert all(first == second for first, second in draws)
    assert len({first for first, _ in draws}) == 20  # and moves on
    rises.clear()
    sharp(trainer, Noisy(dropout=0.5), epochs=5, second_pass="fresh")
    assert min(rises) < 0


def test_random_numbers_go_on_as_in_plain_training(trainer):
    ends = []
    for callbacks in ([], [SharpnessAwareTraining(SAM)]):
        torch.manual_seed(5)
        trainer(callbacks=callbacks).fit(Plain(dropout=0.5), batches())
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)


def test_a_generator_of_the_modules_own_is_put_back(trainer):
    class Own(Plain):
        def __init__(self):
            super().__init__()
            self.noise = torch.Generator().manual_seed(3)
            self.seen = []

        def training_step(self, batch, batch_idx):
            seen.append(torch.rand((), generator=self.noise).item())
            return super().training_step(batch, batch_idx)

    seen = []
    sharp(trainer, Own())
    assert seen[::2] == seen[1::2]
    assert len(set(seen)) == 4


class Pop(Plain):
    def training_step(self, batch, batch_idx):
        return mse_loss(self.net(batch["x"]), batch.pop("y"))


class Replace(Plain):
    def training_step(self, batch, batch_idx):
        batch["x"] = batch["x"] + 1
        return mse_loss(self.net(batch["x"]), batch["y"])


class Overwrite(Plain):
    """Predictions under the targets' name."""

    def training_step(self, batch, batch_idx):
        y = batch["y"]
        batch["y"] = self.net(batch["x"])
        return mse_loss(batch["y"], y)


class InPlace(Plain):
    def training_step(self, batch, batch_idx):
        batch["x"].add_(1)
        return mse_loss(self.net(batch["x"]), batch["y"])


class InPlaceUnseen(Plain):
    """What version counters do not show."""

    def training_step(self, batch, batch_idx):
        batch["x"].data.add_(1)
        return mse_loss(self.net(batch["x"]), batch["y"])


@pytest.mark.parametrize(("kind", "shift"), [(Pop, 0), (Replace, 1), (Overwrite, 0), (InPlace, 1), (InPlaceUnseen, 1)])
def test_the_second_pass_gets_the_batch_as_it_came(trainer, kind, shift):
    module, expected = kind(), Plain()
    sharp(trainer, module, rows())
    sharp_loop(expected, rows(), loss=lambda net, batch: mse_loss(net(batch["x"] + shift), batch["y"]))
    assert distance(module, expected) < 1e-14


def test_hooks_see_the_batch_that_the_first_pass_left(trainer):
    class Seeing(Pop):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert "y" not in batch

    sharp(trainer, Seeing(), rows())


# And it leaves no trace.


class Collecting(Plain):
    """Whatever a step may collect and count: buffers, a queue, metrics, lists, numbers, an object of one's own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(100))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("center", torch.zeros(1))
        self.register_buffer("large", torch.zeros(2**18 + 5))
        self.accuracy, self.mean = BinaryAccuracy(), MeanMetric()
        self.outputs, self.seen, self.by_name = [], 0, {"a": []}
        self.ordered, self.counted, self.grouped = OrderedDict(a=1, b=2), Counter(), defaultdict(list)
        self.tree = {}
        self.tree["me"] = self.tree
        self.register_buffer("adjacency", torch.eye(6).to_sparse())
        self.register_buffer("mask", torch.ones(1, 6).expand(8, 6))
        self.history = History()
        self.plain = torch.zeros(1)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            self.queue[self.count] = loss
            self.count += 1
            self.center.data += 1
            self.large.data[0] += 1
            self.plain = self.plain + 1
        self.accuracy(self.net(batch[0])[:, 0].sigmoid(), (batch[1][:, 0] > 0).long())
        self.mean.update(loss.detach())
        self.outputs.append(loss.item())
        self.by_name["a"].append(1)
        self.ordered.popitem(last=False)
        self.ordered[self.seen] = 3
        self.counted["steps"] += 1
        self.grouped["steps"].append(1)
        self.history.add(loss.item())
        self.seen += 1
        return {"loss": loss, "batch_idx": batch_idx}


class History:
    def __init__(self):
        self.values = []

    def add(self, value):
        self.values = [*self.values, value]


@pytest.mark.parametrize("second_pass", ["replay", "fresh"])
def test_a_step_collects_once_per_batch(trainer, second_pass):
    module = Collecting()
    outputs = []

    class Outputs(SharpnessAwareTraining):
        def on_train_batch_end(self, trainer, pl_module, output, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, output, batch, batch_idx)
            outputs.append(output)

    trainer(callbacks=[Outputs(SAM, second_pass=second_pass)]).fit(module, batches())
    assert module.count == module.seen == len(module.outputs) == len(module.history.values) == 4
    assert module.queue[:4].tolist() == pytest.approx(module.outputs, abs=1e-6)
    assert module.queue[4] == 0
    assert module.center == module.large[0] == module.plain == 4
    assert module.by_name == {"a": [1] * 4}
    assert module.ordered == OrderedDict({2: 3, 3: 3})
    assert module.counted == {"steps": 4}
    assert module.grouped == {"steps": [1] * 4}
    assert module.mean.compute().item() == pytest.approx(sum(module.outputs) / 4, abs=1e-6)
    assert module.accuracy.confmat.sum() if hasattr(module.accuracy, "confmat") else True
    assert module.accuracy._update_count == 4
    assert [output["batch_idx"] for output in outputs] == [0, 1, 2, 3]
    assert [output["loss"].item() for output in outputs] == module.outputs


class Teacher(Plain):
    """A teacher that follows the student within the step, as in BYOL, and takes part in the loss."""

    def __init__(self, hides_it=False):
        super().__init__()
        self.teacher = nn.Linear(4, 1).double().requires_grad_(False)
        self.hides_it = hides_it

    def training_step(self, batch, batch_idx):
        follow(self.teacher, self.net, self.hides_it)
        return mse_loss(self.net(batch[0]), batch[1] + self.teacher(batch[0]))


@torch.no_grad()
def follow(teacher, student, hides_it):
    for parameter in teacher.parameters():
        target = parameter.data if hides_it else parameter
        target.mul_(0.9).add_(0.1 * student[0].weight.mean())


@pytest.mark.parametrize("hides_it", [False, True], ids=["counted", "by .data"])
def test_a_teacher_follows_once_and_is_named(trainer, hides_it):
    module, expected = Teacher(hides_it), Teacher(hides_it)
    with pytest.warns(
        UserWarning, match=r"teacher.weight, teacher.bias: not trained, .* Move the change to on_train_batch_end"
    ):
        sharp(trainer, module)
    weights = list(expected.net.parameters())
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9)
    for x, y in batches():
        start = copy.deepcopy(expected.teacher.state_dict())
        follow(expected.teacher, expected.net, hides_it)

        def loss(x=x, y=y):
            return mse_loss(expected.net(x), y + expected.teacher(x))

        first = torch.autograd.grad(loss(), weights)
        norm = torch.sqrt(sum(g.square().sum() for g in first))
        before, end = [w.detach().clone() for w in weights], copy.deepcopy(expected.teacher.state_dict())
        expected.teacher.load_state_dict(start)
        with torch.no_grad():
            for w, g in zip(weights, first, strict=True):
                w += RHO * g / norm
        follow(expected.teacher, expected.net, hides_it)
        second = torch.autograd.grad(loss(), weights)
        for w, b, g in zip(weights, before, second, strict=True):
            w.data.copy_(b)
            w.grad = g
        expected.teacher.load_state_dict(end)
        optimizer.step()
    assert distance(module, expected) < 1e-14


def test_what_changes_late_and_unexpectedly_is_named_once(trainer):
    class Late(Plain):
        def __init__(self):
            super().__init__()
            self.teacher = nn.Parameter(torch.zeros(2**17 + 1, dtype=torch.float64), requires_grad=False)

        def training_step(self, batch, batch_idx):
            if self.global_step >= 2:
                with torch.no_grad():
                    self.teacher += 1
            return super().training_step(batch, batch_idx)

    module = Late()
    with pytest.warns(UserWarning, match="teacher: changed in training_step for the first time"):
        sharp(trainer, module, epochs=2)
    assert module.teacher[0] == 6


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


def test_layers_that_are_made_by_the_first_batch_count_once(trainer):
    class Lazy(Plain):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(1)).double()

    for plugins in ([], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]):
        module = Lazy()
        sharp(trainer, module, plugins=plugins)
        assert module.net[1].num_batches_tracked == 4


def test_a_sharp_module_is_exported_as_any_other():
    class Own(SharpByMixin):
        def forward(self, x):
            return self.net(x)

    module, x = Own(), torch.randn(2, 4, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        assert torch.equal(module.to_torchscript()(x), module(x))


class Graph:
    """A batch as graph libraries have them: an object with tensors and containers for attributes."""

    def __init__(self, x, y):
        self.x, self.y, self.meta = x, y, {"seen": 0}


def test_a_batch_that_is_an_object_comes_as_it_was(trainer):
    seen = []

    class Mine(Plain):
        def training_step(self, batch, batch_idx):
            batch.x.add_(1)
            batch.meta["seen"] += 1
            seen.append((batch.x.mean().item(), batch.meta["seen"]))
            return mse_loss(self.net(batch.x), batch.y)

    class Graphs:
        def __iter__(self):
            return (Graph(x.clone(), y) for x, y in batches())

        def __len__(self):
            return 4

    sharp(trainer, Mine(), Graphs())
    assert seen[::2] == seen[1::2]
    assert {count for _, count in seen} == {1}


def test_packed_sequences_are_batches_too(trainer):
    class Recurrent(Plain):
        def __init__(self):
            super().__init__()
            self.net = nn.GRU(4, 3).double()

        def training_step(self, batch, batch_idx):
            return self.net(batch[0])[1].square().mean() + batch[1].mean()

    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 4, dtype=torch.float64) for n in (5, 3)])
    assert sharp(trainer, Recurrent(), Once((packed, torch.zeros(2)))).global_step == 1


class Once:
    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_a_batch_of_nothing_has_no_loss(trainer):
    first, second, *_ = batches()
    made = sharp(trainer, frozen := Plain(), Once(first, None, None, second), log_every_n_steps=1)
    twin = Plain()
    sharp_loop(twin, [first])
    losses = [Plain().training_step(first, 0).item(), twin.training_step(second, 0).item()]
    assert made.callback_metrics["train/loss_epoch"].item() == pytest.approx(sum(losses) / 2)
    assert distance(frozen, twin) > 0


def test_a_parameter_that_the_step_thaws_is_trained_like_the_others(trainer):
    class Thawing(Plain):
        def __init__(self):
            super().__init__()
            self.net[0].requires_grad_(False)

        def training_step(self, batch, batch_idx):
            if self.global_step == 2:
                self.net[0].requires_grad_(True)
            moved.append(self.net[0].weight.detach().clone())
            return super().training_step(batch, batch_idx)

    moved = []
    sharp(trainer, Thawing())
    assert torch.equal(moved[2], moved[3])  # frozen
    assert not torch.equal(moved[4], moved[5])  # climbs in the very step that thaws it


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


def test_a_frozen_backbone_is_not_written_to(trainer):
    """Of small layers, whose copies would cost a thousand times the step."""

    class Frozen(Plain):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Linear(4, 4).double().requires_grad_(False)

        def training_step(self, batch, batch_idx):
            return super().training_step((self.backbone(batch[0]), batch[1]), batch_idx)

    module = Frozen()
    sharp(trainer, module, epochs=3)
    assert module.backbone.weight._version <= 2  # what making it in float64 has written


def test_a_module_that_holds_its_data_is_not_copied(trainer, monkeypatch):
    looked_into = []
    original = mutable_values.restorer

    def counted(value, budget):
        looked_into.append(value)
        return original(value, budget)

    class Holding(Plain):
        def __init__(self):
            super().__init__()
            self.rows = [[i] * 100 for i in range(9000)]

        def training_step(self, batch, batch_idx):
            self.rows.append([0])
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(mutable_values, "restorer", counted)
    module = Holding()
    sharp(trainer, module)
    assert len(module.rows) == 9004
    assert len(looked_into) < 4 * 2 * 10_000 + 1000


def test_tensors_in_lists_and_tuples_are_put_back_too(trainer):
    class Hidden(Plain):
        def __init__(self):
            super().__init__()
            self.states, self.pair = [torch.zeros(1)], (torch.zeros(1), [])

        def training_step(self, batch, batch_idx):
            self.states[0].add_(1)
            self.pair[0].add_(1)
            self.pair[1].append(1)
            return super().training_step(batch, batch_idx)

    module = Hidden()
    sharp(trainer, module, epochs=2)
    assert module.states[0] == module.pair[0] == len(module.pair[1]) == 8


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


def test_a_checkpoint_saved_within_the_step_is_the_first_passs(trainer, tmp_path):
    class Saving(Plain):
        def training_step(self, batch, batch_idx):
            if self.global_step == 2 and not weights:
                weights.extend(p.detach().clone() for p in self.parameters())
            if self.global_step == 2:
                self.trainer.save_checkpoint(tmp_path / "within.ckpt")
            return super().training_step(batch, batch_idx)

    weights = []
    made = sharp(trainer, Saving())
    assert made.global_step == 4
    saved = torch.load(tmp_path / "within.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(a, b) for a, b in zip(weights, saved.values(), strict=True))
    assert "save_checkpoint" not in vars(made)


def test_weights_asked_for_in_the_second_pass_are_refused(trainer):
    class Asking(Plain):
        def training_step(self, batch, batch_idx):
            self.state_dict()
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="the weights are perturbed in the second pass"):
        sharp(trainer, Asking())


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


class Meter:
    def __init__(self):
        self.seen, self.inner = [], None

    def update(self):
        self.seen.append(1)


class Average:
    """An exponential average as a library keeps it: a list of tensors and a count."""

    def __init__(self, parameters):
        self.shadow, self.updates = [torch.zeros_like(p) for p in parameters], 0

    @torch.no_grad()
    def update(self):
        self.updates += 1
        for tensor in self.shadow:
            tensor += 0.1 * (1 - tensor)


@pytest.mark.parametrize("width", [4, 400], ids=["small", "large"])
def test_objects_in_objects_and_containers_count_once(trainer, width):
    class Holding(Plain):
        def __init__(self):
            super().__init__()
            self.outer = Meter()
            self.outer.inner = Meter()
            self.meters, self.by_name = [Meter()], {"loss": Meter()}
            self.average = Average([torch.zeros(width, width)])

        def training_step(self, batch, batch_idx):
            for meter in (self.outer, self.outer.inner, *self.meters, *self.by_name.values()):
                meter.update()
            self.average.update()
            if not hasattr(self, "made_by_the_step"):
                self.made_by_the_step = 0
            self.made_by_the_step += 1
            return super().training_step(batch, batch_idx)

    module = Holding()
    sharp(trainer, module, epochs=2)
    meters = (module.outer, module.outer.inner, *module.meters, *module.by_name.values())
    assert {len(meter.seen) for meter in meters} == {module.average.updates} == {module.made_by_the_step} == {8}
    assert module.average.shadow[0][0, 0].item() == pytest.approx(1 - 0.9**8, rel=1e-5)


def test_a_hidden_teacher_beside_a_larger_frozen_network_is_found(trainer):
    class Beside(Teacher):
        def __init__(self):
            super().__init__(hides_it=True)
            self.frozen = nn.Linear(1200, 1200).requires_grad_(False)

        def training_step(self, batch, batch_idx):
            for parameter in self.teacher.parameters():
                parameter.data.add_(1)
            return Plain.training_step(self, batch, batch_idx)

    module = Beside()
    before = [p.clone() for p in module.teacher.parameters()]
    with pytest.warns(UserWarning, match=r"teacher.weight, teacher.bias: changed in training_step"):
        sharp(trainer, module)
    for parameter, start in zip(module.teacher.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, start + 4)


def test_gradients_of_what_the_optimizer_does_not_have_are_the_first_passs(trainer):
    class Tempered(Plain):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.ones((), dtype=torch.float64))

        def training_step(self, batch, batch_idx):
            return mse_loss(self.temperature * self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.0)

    gradients = []
    for callbacks in ([], [SharpnessAwareTraining(SAM, rho=RHO)]):
        module = Tempered()
        trainer(callbacks=callbacks).fit(module, batches())
        gradients.append(module.temperature.grad.item())
    assert gradients[0] == gradients[1]


def test_a_large_buffer_that_only_the_second_pass_changes_is_put_back(trainer):
    class Odd(SharpByMixin):
        def __init__(self):
            super().__init__()
            self.register_buffer("large", torch.zeros(2**18 + 1))

        def training_step(self, batch, batch_idx):
            if self.is_second_pass and self.global_step > 0:
                self.large += 1
            return super().training_step(batch, batch_idx)

    module = Odd()
    trainer().fit(module, batches())
    assert module.large.sum() == 0
