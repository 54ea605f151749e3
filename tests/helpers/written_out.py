"""Sharpness-aware minimization written out in plain Lightning, to hold a sharp run against.

Nothing here knows sam_lightning. The reference is a run in automatic optimization of the same unedited module; only the
gradients that its optimizer meets are those at w + rho g / ||g||. Whatever else Lightning does, it does itself.
"""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn


class WrittenOut:
    """Replaces the gradient at w by the gradient at w + rho g / ||g||, just before the step.

    The second pass runs in a copy of the whole module that was made just before the first one, with a copy of the batch
    and the random states of that moment: it is the same function, and nothing of it can reach the module.
    To be mixed into the Callback of either Lightning package.
    """

    rho: float

    def on_train_start(self, trainer: Any, module: Any) -> None:
        training_step = trainer.strategy.training_step

        def spied(*args: Any) -> Any:
            with mock.patch.object(Tensor, "__deepcopy__", _copied):
                self.twin, self.args = copy.deepcopy((module, args))
            self.twin.trainer = trainer  # which Lightning leaves out of copies
            self.states = random_states()
            return training_step(*args)

        trainer.strategy.training_step = spied

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        groups = [p for group in optimizer.param_groups for p in group["params"]]
        twins = dict(zip(module.parameters(), self.twin.parameters(), strict=True))
        norm = torch.stack([p.grad.norm() for p in groups if p.grad is not None]).norm()
        with torch.no_grad():
            for p in groups:
                if p.grad is not None:
                    twins[p].copy_(p + self.rho * p.grad / norm)  # w is where the first pass left it
        self.twin.zero_grad()
        self.twin.log = lambda *args, **kwargs: None
        after = random_states()
        set_random_states(self.states)
        with torch.enable_grad(), trainer.precision_plugin.train_step_context():
            output = self.twin.training_step(*self.args)
            (output if isinstance(output, Tensor) else output["loss"]).backward()
        self.twin.on_after_backward()
        set_random_states(after)
        for p in groups:
            p.grad = twins[p].grad


def _copied(tensor: Tensor, memo: dict[int, Any], of_leaf: Any = Tensor.__deepcopy__) -> Any:
    """torch copies no tensor that has a graph, such as one that a module keeps from an earlier step."""
    if not tensor.is_leaf:
        tensor = tensor.detach()
        memo.setdefault(id(memo), []).append(tensor)  # kept alive as copy does it: copies are known by what they are of
    return of_leaf(tensor, memo)


def sharp_gradients(
    model: nn.Module,
    losses: Callable[[nn.Module], list[Tensor]],
    climbing: Callable[[nn.Module], nn.Module] = lambda model: model,
    rho: float = 0.05,
) -> None:
    """For plain loops: leaves in `model` the gradient of the sum of `losses(model)` at w + rho g / ||g||.

    `losses` runs once through the model and once through a copy of it, from the same random states. `climbing` names
    the part whose weights are moved, by default all.
    """
    twin, states = copy.deepcopy(model), random_states()
    model.zero_grad()
    torch.stack(losses(model)).sum().backward()
    after = random_states()
    both = zip(climbing(model).parameters(), climbing(twin).parameters(), strict=True)
    pairs = [(p, q) for p, q in both if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p, _ in pairs]).norm()
    with torch.no_grad():
        for p, q in pairs:
            q.add_(rho * p.grad / norm)
    set_random_states(states)
    torch.stack(losses(twin)).sum().backward()
    set_random_states(after)
    for p, q in pairs:
        p.grad = q.grad


class Diary:
    """What a run shows outside: learning rates after every batch. To be mixed into a Callback, too."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.rates.append([group["lr"] for o in trainer.optimizers for group in o.param_groups])


@dataclass
class Run:
    """A finished run of `module`."""

    module: Any
    trainer: Any
    rates: list[list[float]]
    logged: list[tuple[int, dict[str, float]]]
    start: dict[str, Tensor] = field(repr=False)

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and floating-point buffers."""
        named = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        return {name: t.detach().clone() for name, t in named.items() if t.is_floating_point()}


def run(make_module: Any, make_data: Any, callbacks: list[Any], tmp_path: Any, epochs: int = 2, **options: Any) -> Run:
    """Trains in float64 from seed 0; `make_data` gives what `Trainer.fit` takes as keyword arguments."""
    seed(0)
    module, data = make_module(), make_data()
    lightning = package_of(module)
    diary = type("Diary", (Diary, lightning.Callback), {})()

    class Log(lightning.loggers.logger.DummyLogger):
        def __init__(self) -> None:
            super().__init__()
            self.rows: list[tuple[int, dict[str, float]]] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.rows.append((step, dict(metrics)))

    log = Log()
    trainer = lightning.Trainer(
        **{
            "precision": "64-true",
            "max_epochs": epochs,
            "accelerator": "cpu",
            "devices": 1,
            "logger": log,
            "log_every_n_steps": 1,
            "callbacks": [*callbacks, diary],
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            **options,
        }
    )
    start = {name: p.detach().double().clone() for name, p in module.named_parameters()}
    seed(1)
    trainer.fit(module, **data)
    return Run(module, trainer, diary.rates, log.rows, start)


def written_out(make_module: Any, make_data: Any, tmp_path: Any, rho: float, **options: Any) -> Run:
    """The reference run."""
    lightning = package_of(make_module())
    reference = type("Reference", (WrittenOut, lightning.Callback), {"rho": rho})()
    return run(make_module, make_data, [reference], tmp_path, **options)


def assert_same(sharp: Run, reference: Run, tolerance: float = 1e-10) -> None:
    """Weights, buffers, count of steps, schedule, logs and metrics of a sharp run are the reference's."""
    assert sharp.trainer.global_step == reference.trainer.global_step > 0
    moved = max((p - reference.start[n]).abs().max().item() for n, p in reference.module.named_parameters())
    assert moved > 1e4 * tolerance, f"nothing was trained: {moved}"
    here, there = sharp.tensors(), reference.tensors()
    assert here.keys() == there.keys()
    far = {name: distance for name in here if not (distance := _distance(here[name], there[name])) <= tolerance}
    assert not far, f"of weights that moved {moved:.2g}, too far from the written-out loop: {far}"
    assert sharp.module.state_dict().keys() == reference.module.state_dict().keys()
    assert len(sharp.rates) == len(reference.rates)
    for here_now, there_now in zip(sharp.rates, reference.rates, strict=True):
        assert here_now == pytest.approx(there_now, rel=1e-12), f"{sharp.rates} instead of {reference.rates}"
    _assert_contains(sharp.trainer.callback_metrics, reference.trainer.callback_metrics)
    rows: dict[int, dict[str, float]] = {}
    for step, metrics in sharp.logged:
        rows.setdefault(step, {}).update(metrics)
    for step, metrics in reference.logged:
        assert step in rows, f"nothing logged at step {step}, there {metrics}"
        _assert_contains(rows[step], metrics)


def _assert_contains(here: dict[str, Any], there: dict[str, Any]) -> None:
    for name, value in there.items():
        assert name in here, f"{name} is not logged, only {sorted(here)}"
        assert np.allclose(float(here[name]), float(value), rtol=1e-8, atol=1e-10, equal_nan=True), (
            f"{name}: {float(here[name])}, written out {float(value)}"
        )


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs() / b.abs().clamp(min=1)).max().item() if a.numel() else 0.0


def package_of(module: Any) -> Any:
    """The Lightning that `module` is written for, under the name that it imports."""
    import lightning.pytorch

    if isinstance(module, lightning.pytorch.LightningModule):
        return lightning.pytorch
    import pytorch_lightning

    return pytorch_lightning


def seed(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def random_states() -> tuple[Any, Any, Any]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def set_random_states(states: tuple[Any, Any, Any]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
