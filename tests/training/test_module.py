"""SharpnessAwareModule under a real Trainer: the step, its bookkeeping, precision, faults and resume."""

import math
from collections import defaultdict
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from regression import SAM_SGD, SGD, Regression, assert_same, bare_loop, loader, make_network, resumable, state_of
from sam_lightning import ASAM, SAM
from sam_lightning.callbacks import RandomStates

ASAM_SGD = partial(ASAM, base=SGD, rho=0.5)


class Recorder(Callback):
    """Keeps the learning rates and states after every step."""

    def __init__(self):
        self.rates, self.states = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.states.append(state_of(module))


@pytest.mark.parametrize("factory", [SGD, SAM_SGD, ASAM_SGD], ids=["sgd", "sam", "asam"])
@pytest.mark.parametrize("both", [False, True], ids=["stats-first", "stats-both"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_training_equals_the_bare_loop(trainer, factory, both, clip):
    module = Regression(factory, batch_norm_stats="both" if both else "first")
    fit = trainer(max_epochs=2, gradient_clip_val=clip)
    fit.fit(module, loader())

    network = make_network()
    bare_loop(network, factory(list(network.named_parameters())), 2 * list(loader()), both, clip)
    assert_same(state_of(module.network), state_of(network))
    assert fit.global_step == 16


@pytest.mark.parametrize("micro", [2, 3, 8, 20])
def test_micro_batches_equal_the_written_out_accumulation(trainer, micro):
    module = Regression(network=make_network(norm=False), micro_batches=micro)
    fit = trainer()
    fit.fit(module, loader(batch_size=10, samples=64))  # the last batch has 4

    network = make_network(norm=False)
    optimizer = SAM_SGD(list(network.named_parameters()))
    for x, y in loader(batch_size=10, samples=64):
        bare_loop(network, optimizer, [(x, y)], micro=min(micro, len(x)))
    assert_same(state_of(module.network), state_of(network))
    assert fit.global_step == 7

    whole = make_network(norm=False)
    bare_loop(whole, SAM_SGD(list(whole.named_parameters())), loader(batch_size=10, samples=64))
    for a, b in zip(whole.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_global_step_counts_batches_and_max_steps_stops(trainer, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    fit = trainer(max_steps=5, max_epochs=-1, callbacks=[checkpoint], enable_checkpointing=True)
    fit.fit(Regression(), loader())
    assert fit.global_step == 5
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=2.ckpt", "step=4.ckpt"]


def test_schedulers_by_step_and_by_epoch(trainer):
    by_step, by_epoch = Recorder(), Recorder()
    cosine = partial(CosineAnnealingLR, T_max=16)
    trainer(max_epochs=2, callbacks=[by_step]).fit(
        Regression(lr_scheduler=cosine, lr_scheduler_interval="step"), loader()
    )
    expected = [0.05 * (1 + math.cos(math.pi * step / 16)) / 2 for step in range(1, 17)]
    assert by_step.rates == pytest.approx(expected)

    trainer(max_epochs=2, callbacks=[by_epoch]).fit(
        Regression(lr_scheduler=partial(StepLR, step_size=1, gamma=0.5)), loader()
    )
    assert by_epoch.rates == [0.05] * 7 + [0.025] * 8 + [0.0125]


def test_reduce_on_plateau_sees_the_validation(trainer):
    class Flat(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", torch.tensor(1.0))

    plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.1)
    fit = trainer(max_epochs=3)
    fit.fit(Flat(lr_scheduler=plateau), loader(), loader())
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.1**2)

    with pytest.raises(MisconfigurationException, match="metric val/loss which is not available"):
        trainer().fit(Regression(lr_scheduler=plateau), loader())


def test_logs_are_gated_and_named(trainer, monkeypatch):
    logged = {}

    class Listening(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("own", loss.detach())
            return loss

    def listen(module, name, value, **options):
        batch = module.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        logged.setdefault(name, []).append((batch, float(value)))

    monkeypatch.setattr(LightningModule, "log", listen)
    trainer(log_every_n_steps=3, gradient_clip_val=1e-3).fit(Listening(), loader())
    for name in ("train/loss", "train/loss_perturbed", "train/grad_norm", "lr"):
        assert [step for step, _ in logged[name]] == [3, 6], name
    assert len(logged["own"]) == 8  # once per batch, not per pass

    network = make_network()
    losses = bare_loop(network, SAM_SGD(list(network.parameters())), loader(), clip=1e-3)
    assert logged["train/loss_epoch"] == [(8, pytest.approx(sum(losses) / 8))]
    assert logged["train/loss"] == [(3, pytest.approx(losses[2])), (6, pytest.approx(losses[5]))]

    network = make_network()  # the third batch's gradient at w, unclipped
    batches = list(loader())
    optimizer = SAM_SGD(list(network.parameters()))
    bare_loop(network, optimizer, batches[:2], clip=1e-3)
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(network(batches[2][0]), batches[2][1]).backward()
    norm = torch.cat([p.grad.flatten() for p in network.parameters()]).norm().item()
    assert logged["train/grad_norm"][0] == (3, pytest.approx(norm))


def test_bf16_mixed_perturbs_in_float32(trainer):
    seen = []

    class Watching(Regression):
        def training_step(self, batch, batch_idx):
            seen.append((self.is_second_pass, [p.detach().clone() for p in self.parameters()]))
            return super().training_step(batch, batch_idx)

    trainer(precision="bf16-mixed", max_steps=1).fit(Watching(), loader())
    (_, before), (second, after) = seen
    assert second
    length = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]).norm()
    assert length.item() == pytest.approx(0.1, rel=1e-4)


def half_precision(scale=1024.0, growth_interval=2000):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
    return MixedPrecision("16-mixed", "cpu", scaler)


@pytest.mark.parametrize(("scale", "growth_interval"), [(1024.0, 2000), (2.0, 1)], ids=["constant", "growing"])
def test_fp16_scaling_equals_the_bare_loop_with_a_scaler(trainer, scale, growth_interval):
    module = Regression()
    plugin = half_precision(scale, growth_interval)
    fit = trainer(plugins=[plugin], log_every_n_steps=1, gradient_clip_val=0.05)
    fit.fit(module, loader())

    network = make_network()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
    optimizer = SAM_SGD(list(network.parameters()))
    norms = []
    for x, y in loader():
        with torch.autocast("cpu", torch.half, cache_enabled=False):
            optimizer.zero_grad()
            scaler.scale(torch.nn.functional.mse_loss(network(x), y)).backward()
            norms.append(torch.cat([p.grad.flatten() for p in network.parameters()]).norm().item() / scaler.get_scale())
            stats = [b.clone() for b in network.buffers()]
            with optimizer.perturbed():
                optimizer.zero_grad()
                scaler.scale(torch.nn.functional.mse_loss(network(x), y)).backward()
            for buffer, before in zip(network.buffers(), stats, strict=True):
                buffer.copy_(before)
            # Here and not above, as the trained network's statistics are the first pass's.
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(network.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
    assert_same(state_of(module.network), state_of(network))
    assert fit.logged_metrics["train/grad_norm"].item() == pytest.approx(norms[-1], rel=1e-5)


@pytest.mark.parametrize("bad_pass", [1, 2])
@pytest.mark.parametrize("factory", [SAM_SGD, ASAM_SGD], ids=["sam", "asam"])
def test_an_overflow_in_either_pass_skips_the_step(trainer, bad_pass, factory):
    class Overflowing(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            overflows = self.global_step == 3 and self.is_second_pass == (bad_pass == 2)
            return loss + (0 * self.network[0].weight.sum() * math.inf if overflows else 0)

    plugin, recorder = half_precision(), Recorder()
    module = Overflowing(factory, batch_norm_stats="both")
    fit = trainer(plugins=[plugin], callbacks=[recorder])
    fit.fit(module, loader())
    weights = [{k: v for k, v in s.items() if "running" not in k and "tracked" not in k} for s in recorder.states]
    assert_same(weights[3], weights[2])  # skipped
    with pytest.raises(AssertionError):
        assert_same(weights[4], weights[3])  # and on it goes
    assert plugin.scaler.get_scale() == 512
    assert all(value.isfinite().all() for value in recorder.states[-1].values())
    assert fit.global_step == 8


@pytest.mark.parametrize("bad_pass", [1, 2])
@pytest.mark.parametrize("stats", ["first", "both"])
@pytest.mark.parametrize("factory", [SGD, SAM_SGD], ids=["sgd", "sam"])
def test_an_overflow_of_activations_leaves_no_trace(trainer, bad_pass, stats, factory):
    class Overflowing(Regression):
        def training_step(self, batch, batch_idx):
            x, y = batch
            overflows = self.global_step == 3 and self.is_second_pass == (bad_pass == 2)
            return super().training_step((x * 1e6 if overflows else x, y), batch_idx)

    plugin, recorder = half_precision(), Recorder()
    trainer(plugins=[plugin], callbacks=[recorder]).fit(Overflowing(factory, batch_norm_stats=stats), loader())
    assert all(value.isfinite().all() for value in recorder.states[-1].values())
    if bad_pass == 1 or factory is SAM_SGD:
        assert_same(recorder.states[3], recorder.states[2])
        assert plugin.scaler.get_scale() == 512
    assert recorder.states[-1]["network.1.num_batches_tracked"] > 3


def test_clipping_does_not_hang_on_a_hook(trainer):
    class Hooked(Regression):
        def on_before_optimizer_step(self, optimizer):
            """A user's own, without super()."""

    module = Hooked(partial(SAM, base=partial(torch.optim.SGD, lr=1.0)))
    before = state_of(module)
    trainer(max_steps=1, gradient_clip_val=1e-6).fit(module, loader())
    moved = torch.cat([(p - before[n]).flatten() for n, p in module.named_parameters()]).norm()
    assert 0 < moved.item() < 2e-6  # 1e-6 but for the rounding of weights near 1


def test_schedulers_of_ones_own_keep_their_interval_and_frequency(trainer):
    class Own(Regression):
        def configure_optimizers(self):
            optimizer = SAM_SGD(self.named_parameters())
            scheduler = StepLR(optimizer, 1, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **schedule}}

    for schedule, expected in (
        ({"interval": "step"}, [0.05 * 0.5**n for n in range(1, 9)]),
        ({"interval": "step", "frequency": 3}, [0.05] * 2 + [0.025] * 3 + [0.0125] * 3),
        ({"interval": "epoch"}, [0.05] * 7 + [0.025]),
    ):
        recorder = Recorder()
        trainer(callbacks=[recorder]).fit(Own(), loader())
        assert recorder.rates == pytest.approx(expected), schedule


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), torch.OutOfMemoryError("full")])
def test_an_error_in_the_second_pass_leaves_the_weights(trainer, error):
    before = {}

    class Failing(Regression):
        def training_step(self, batch, batch_idx):
            if self.global_step == 2:
                if self.is_second_pass:
                    raise error
                before.update(state_of(self))
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else type(error)):
        trainer().fit(module, loader())
    after = state_of(module)
    for name, value in before.items():
        if "running" in name or "tracked" in name:  # the first pass has moved them
            continue
        assert torch.equal(value, after[name]), name
    assert not module.is_second_pass


STOPS = {"mid-first-epoch": 5, "epoch-end": 8, "mid-second-epoch": 11}
RESUMED = [
    pytest.param(factory, workers, stop, id=f"{name}-{workers}-{where}", marks=[] if is_usual else pytest.mark.slow)
    for name, factory in {"sgd": SGD, "sam": SAM_SGD, "asam": ASAM_SGD}.items()
    for workers in (0, 2)
    for where, stop in STOPS.items()
    for is_usual in [name == "sam" if workers == 0 else stop == 11 and name != "sgd"]
]


@pytest.mark.parametrize(("factory", "workers", "stop"), RESUMED)
@pytest.mark.filterwarnings("ignore:You are resuming from a checkpoint that ended before the epoch ended")  # exact here
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # of callbacks that compare nothing
def test_resume_is_bit_identical(trainer, tmp_path, factory, workers, stop):
    """Momentum, dropout, order, running statistics, schedule and the epoch's mean loss, from a fresh module."""

    class Recording(Regression):
        def on_train_epoch_end(self):
            super().on_train_epoch_end()
            means[self].append(self.trainer.callback_metrics["train/loss_epoch"].item())

    means = defaultdict(list)

    def fit(folder, ckpt_path=None):
        module = Recording(factory, network=make_network(dropout=0.3), lr_scheduler=partial(CosineAnnealingLR, T_max=3))
        by_step = ModelCheckpoint(tmp_path / folder, every_n_train_steps=stop, filename="{step}", save_top_k=-1)
        by_epoch = ModelCheckpoint(
            tmp_path / folder, filename="end-{step}", save_top_k=-1, save_on_train_epoch_end=True
        )
        callbacks = [by_step, by_epoch, RandomStates()]
        run = trainer(max_epochs=3, callbacks=callbacks, enable_checkpointing=True, log_every_n_steps=1)
        torch.manual_seed(3 if ckpt_path is None else 4)
        run.fit(module, resumable(workers), ckpt_path=ckpt_path, weights_only=True)
        return module, run

    straight, undisturbed = fit("straight")
    name = f"end-step={stop}.ckpt" if stop == 8 else f"step={stop}.ckpt"
    resumed, run = fit("resumed", ckpt_path=tmp_path / "straight" / name)
    assert run.global_step == undisturbed.global_step == 24
    assert_same(state_of(resumed), state_of(straight))
    for a, b in zip(
        run.optimizers[0].state_dict()["state"].values(),
        undisturbed.optimizers[0].state_dict()["state"].values(),
        strict=True,
    ):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])
    assert (
        run.lr_scheduler_configs[0].scheduler.state_dict() == undisturbed.lr_scheduler_configs[0].scheduler.state_dict()
    )
    assert means[resumed] == means[straight][stop // 8 :]
    for key, value in undisturbed.callback_metrics.items():
        assert run.callback_metrics[key] == value, key
