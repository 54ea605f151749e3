"""Every method takes the same steps in Lightning as in a loop: accumulation, loss scaling, resume, what is refused."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from cases import CASES, SGD, every_case
from regression import Regression, assert_same, loader, make_data, make_network, resumable, state_of
from sam_lightning.training.strategies import StrategyError, refuse_options


def sharp(case):
    return lambda params: case.make(list(params), SGD)


def optimizer_state(optimizer):
    """All of it, flat."""
    flat = {}
    for index, values in optimizer.state_dict()["state"].items():
        flat |= {f"{index}.{name}": value for name, value in values.items() if isinstance(value, torch.Tensor)}
    flat["steps"] = torch.tensor([group["sharpness_step"] for group in optimizer.param_groups])
    return flat


def loop(network, optimizer, batches, accumulate=1, scaler=None, overflow=None):
    """Steps by `passes`, k batches each; `overflow`: (step, pass) whose loss is made infinite."""
    batches = list(batches)
    for step in range(len(batches) // accumulate):
        kept = None
        for x, y in batches[step * accumulate : (step + 1) * accumulate]:
            calls = []

            def losses(x=x, y=y, calls=calls, step=step):
                calls.append(1)
                loss = mse_loss(network(x), y)
                return loss * float("inf") if overflow == (step, len(calls)) else loss

            optimizer.passes(losses, model=network, scaler=scaler)
            gradients = [p.grad / accumulate for p in network.parameters()]
            kept = gradients if kept is None else [a + b for a, b in zip(gradients, kept, strict=True)]
        for parameter, gradient in zip(network.parameters(), kept, strict=True):
            parameter.grad = gradient
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()


@every_case
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_equals_the_loop(trainer, case, accumulate):
    module = Regression(sharp(case), network=make_network(dropout=0.3))
    fit = trainer(accumulate_grad_batches=accumulate)
    torch.manual_seed(5)
    fit.fit(module, loader())
    network = make_network(dropout=0.3)
    optimizer = sharp(case)(network.named_parameters())
    torch.manual_seed(5)
    loop(network, optimizer, loader(), accumulate)
    assert_same(state_of(module.network), state_of(network))
    assert_same(optimizer_state(fit.optimizers[0]), optimizer_state(optimizer))


@every_case
@pytest.mark.parametrize("bad_pass", [1, 2])
def test_a_step_that_loss_scaling_skips_leaves_no_trace(trainer, case, bad_pass):
    if bad_pass > case.passes[3]:
        pytest.skip("the method has one pass in this step")
    passes = []

    class Overflowing(Regression):
        def training_step(self, batch, batch_idx):
            passes.append(self.global_step)
            loss = super().training_step(batch, batch_idx)
            is_bad = self.global_step == 3 and passes.count(3) == bad_pass and self.trainer.current_epoch == 0
            return loss * float("inf") if is_bad else loss

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=1024.0)

    module = Overflowing(sharp(case), network=make_network(norm=False).double())
    plugin = MixedPrecision("16-mixed", "cpu", scaler())
    plugin.forward_context = lambda: torch.autocast("cpu", enabled=False)  # the scaler alone, for exact numbers
    batches = DataLoader(TensorDataset(*(t.double() for t in make_data().tensors)), batch_size=8)
    fit = trainer(plugins=[plugin])
    fit.fit(module, batches)

    network = make_network(norm=False).double()
    optimizer, expected = sharp(case)(network.named_parameters()), scaler()
    loop(network, optimizer, batches, scaler=expected, overflow=(3, bad_pass))
    assert plugin.scaler.get_scale() == expected.get_scale() == 512
    assert optimizer.steps == 7
    assert_same(state_of(module.network), state_of(network))
    assert_same(optimizer_state(fit.optimizers[0]), optimizer_state(optimizer))


@every_case
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:You are resuming from a checkpoint that ended before the epoch ended")
def test_a_resume_within_an_interval_is_exact(trainer, tmp_path, case):
    """Steps 4 and 5 lie between two perturbations of `every=3`, and memories are full by then."""

    def fit(folder, ckpt_path=None):
        module = Regression(sharp(case), network=make_network(norm=False))
        saved = ModelCheckpoint(tmp_path / folder, every_n_train_steps=5, filename="{step}", save_top_k=-1)
        made = trainer(callbacks=[saved], enable_checkpointing=True)
        made.fit(module, resumable(), ckpt_path=ckpt_path, weights_only=True)
        return made, module

    straight, expected = fit("straight")
    resumed, module = fit("resumed", tmp_path / "straight/step=5.ckpt")
    assert straight.global_step == resumed.global_step == 8
    assert_same(state_of(module), state_of(expected))
    assert_same(optimizer_state(resumed.optimizers[0]), optimizer_state(straight.optimizers[0]))


@pytest.mark.parametrize("case", [case for case in CASES if case.optimizer.needs_mean_gradient], ids=lambda c: c.name)
def test_a_method_that_needs_the_mean_gradient_is_refused_where_each_climbs_alone(case):
    trainer = SimpleNamespace(strategy=SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2}, model=None))
    optimizer = sharp(case)(make_network().named_parameters())
    with pytest.raises(StrategyError, match=f"sync_perturbation must be True for {case.optimizer.__name__} in several"):
        refuse_options(trainer, None, optimizer, sync_perturbation=False, micro_batches=1)
    refuse_options(trainer, None, optimizer, sync_perturbation=True, micro_batches=1)
