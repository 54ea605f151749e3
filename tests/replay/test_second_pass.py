"""The second pass is the same function as the first, and leaves no trace."""

import copy
import gc
import random
import weakref
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.functional import mse_loss
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAccuracy

from plain_modules import RHO, Once, Plain, SharpByMixin, batches, distance, rows, sharp, sharp_loop
from sam_lightning import SAM
from sam_lightning.replay import Replay, mutable_values
from sam_lightning.replay.attributes import Owner
from sam_lightning.training import SharpnessAwareTraining

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


def test_layers_that_are_made_by_the_first_batch_count_once(trainer):
    class Lazy(Plain):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(1)).double()

    for plugins in ([], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]):
        module = Lazy()
        sharp(trainer, module, plugins=plugins)
        assert module.net[1].num_batches_tracked == 4


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


def test_attributes_that_stay_are_sorted_in_the_first_step_only(monkeypatch):
    """Else a network of many modules costs each step milliseconds of the host."""
    sorted_ones = []
    original = Owner._sort

    def counted(self):
        sorted_ones.append(self.prefix)
        original(self)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.width, self.sizes, self.seen = nn.BatchNorm1d(4), 4, (1, 2), []
            self.steps = 0

        def forward(self, x):
            if self.counts:
                self.steps += 1
            self.seen.append(1)
            return self.layer(x)

    monkeypatch.setattr(Owner, "_sort", counted)
    network = nn.Sequential(*(Block() for _ in range(3)))
    for block in network:
        block.counts = False
    network[1].counts = True
    replay = Replay(network, network.parameters)
    for _ in range(4):
        sorted_ones.clear()
        replay.begin()
        network(torch.rand(2, 4))
        with replay.again():
            network(torch.rand(2, 4))
    assert set(sorted_ones) == {"1."}
    assert [(block.steps, len(block.seen)) for block in network] == [(0, 4), (4, 4), (0, 4)]


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


@pytest.mark.parametrize("fails", [False, True])
def test_copies_end_with_the_training(trainer, fails):
    """Of the weights, and of large buffers."""
    kept = []

    class Large(Plain):
        def __init__(self):
            super().__init__()
            self.register_buffer("large", torch.zeros(2**18 + 1))

        def on_train_batch_end(self, *args):
            replay, weights = sharp.step.replay, self.trainer.optimizers[0]._now.weights
            kept[:] = [weakref.ref(part) for part in (replay, weights)]
            if fails:
                raise OSError

    module, sharp = Large(), SharpnessAwareTraining(SAM, rho=RHO)
    made = trainer(callbacks=[sharp])
    with pytest.raises(OSError) if fails else nullcontext():  # noqa: PT011
        made.fit(module, batches())
    gc.collect()
    assert [part() for part in kept] == [None, None]


class Counters(Plain):
    """Containers, arrays and generators of every kind that is looked into."""

    def __init__(self):
        super().__init__()
        self.names, self.queue, self.array = set(), deque(maxlen=3), np.zeros(2)
        self.tensors = {"count": torch.zeros(1)}
        self.old, self.new, self.python = np.random.RandomState(1), np.random.default_rng(1), random.Random(1)
        self.draws = []

    def training_step(self, batch, batch_idx):
        self.names.add(len(self.names))
        self.queue.append(len(self.names))
        self.array += 1
        self.tensors["count"] += 1
        self.draws.append((self.old.rand(), self.new.random(), self.python.random()))
        seen.append(self.draws[-1])
        return super().training_step(batch, batch_idx)


seen = []


def test_containers_arrays_and_generators_of_every_kind(trainer):
    seen.clear()
    module = Counters()
    sharp(trainer, module)
    assert module.names == {0, 1, 2, 3}
    assert list(module.queue) == [2, 3, 4]
    assert module.array.tolist() == [4, 4]
    assert module.tensors["count"] == 4
    assert seen[::2] == seen[1::2] == module.draws
    plain = Counters()
    trainer().fit(plain, batches())
    assert module.draws == plain.draws


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor
    notes: list


class Named(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor
    notes: list


@pytest.mark.parametrize("kind", [Pair, Named, lambda x, y, notes: UserDict(x=x, y=y, notes=notes)])
def test_batches_of_every_structure_come_as_they_were(trainer, kind):
    class Mine(Plain):
        def training_step(self, batch, batch_idx):
            x, y, notes = (batch[k] if isinstance(batch, UserDict) else getattr(batch, k) for k in ("x", "y", "notes"))
            x.add_(1)
            notes.append(1)
            counts.append(len(notes))
            return mse_loss(self.net(x), y)

    counts = []
    module, expected = Mine(), Plain()
    sharp(trainer, module, Once(*(kind(x.clone(), y, []) for x, y in batches())))
    sharp_loop(expected, batches(), loss=lambda net, batch: mse_loss(net(batch[0] + 1), batch[1]))
    assert distance(module, expected) < 1e-14
    assert set(counts) == {1}


def test_what_trains_the_module_is_no_state_of_it(trainer):
    """A Trainer of one's own class, which holds all that takes the step, would else be put back in the middle of it."""

    class Own(Trainer):
        pass

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    module, expected = Plain(), Plain()
    made = Own(max_epochs=1, callbacks=[SharpnessAwareTraining(SAM, rho=RHO)], **options)
    module.remembered = made
    made.fit(module, batches())
    sharp_loop(expected, batches())
    assert distance(module, expected) < 1e-14
    assert made.global_step == 4
