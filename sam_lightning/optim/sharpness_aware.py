"""Sharpness-aware optimizers: what is made around a base, and the step that descends."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sam_lightning.optim.checks import check_integer, check_non_negative
from sam_lightning.optim.gradients import GradientVersions
from sam_lightning.optim.parameter_groups import BaseOptimizer, Params
from sam_lightning.optim.passes import Losses, run_passes
from sam_lightning.optim.perturbation import Perturbation
from sam_lightning.optim.step_state import StepState


class SharpnessAware(Perturbation):
    r"""Sharpness-aware minimization around any torch optimizer.

    Minimises the worst loss in a ball around the weights, $\min_w \max_{\|e\| \le \rho} L(w + e)$, by
    the gradient at $w + e$ instead of the gradient at $w$; the ball, and so $e$, is the method's.

        loss_fn(model(x), y).backward()                # gradient at w
        with optimizer.perturbed():                    # w + e
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()            # gradient at w + e
        optimizer.step()                               # the base optimizer's step, at w
        optimizer.zero_grad()

    Parameter groups, state and state dict are the base optimizer's own objects, so that learning rate
    schedulers, checkpoints and warm-up act on the one truth. `rho` is a key of every parameter group:
    a group may bring its own, and a group with `rho=0` is not perturbed. Where the base has a `rho` of its
    own, such as Adadelta's decay, the radius is the key `sam_rho`, and `rho` stays the base's. A group that is given
    may say `sam_rho` with any base.

    Add a method: begin with a copy of `sam_lightning/optim/sam.py` as `<name>.py` beside it, and give it in turn

    - its name in the two `__init__.py` of `sam_lightning` and `sam_lightning/optim`;
    - `configs/optimizers/<name>.yaml`, whose first line says what it is;
    - its formula, written out in float64, in `tests/helpers/oracle_methods.py`, where `Sam` says what is asked;
    - a row in `CASES` of `tests/helpers/cases.py`: name, class, formula and options, with `reaches_the_ball=False` if
      the length of its e is not rho. Every test of the contract then runs on it: `pytest tests/optim -k <name>`, then
      `pytest tests/optim tests/training tests/studies/test_configs.py tests/test_architecture.py`.

    The class has

    - `displacement(weights, grads)`: e for rho = 1, and often nothing else. It must give zeros where the gradient is
      zero or not finite, as `unit_vector(grads)` does. Gradients come times `loss_scale`: divide by it unless e is a
      unit vector. `tensors/vectors.py` also has `Scaled`, `add_`, `multiply_` and `inner_product`;
    - `__init__(params, base, rho=..., every=1, **base_options)`, which checks its own options (`checks.py`), keeps them
      as public attributes and calls `super().__init__`;
    - where both gradients decide what descends: `descent`, with `keeps_first_gradient = True` if it needs the first
      one (`gsam.py`), or `blend` if it is a fixed mixture of the two, which needs no memory (`wsam.py`);
    - where something lasts from step to step: `memory`, its name in the state, `recall` to read it and `remember` to
      renew it, without the gradients' `loss_scale`, with `keeps_first_gradient = True` (`friendly_sam.py`);
    - `needs_mean_gradient = True` if what descends depends on a process's own first gradient otherwise than through e
      and `blend`, or a memory does: without the mean over all processes they would drift apart;
    - `needs_first_gradient = False` if e comes from elsewhere: one pass (`msam.py`).

    Args:
        params: Parameters, `(name, parameter)` pairs, or group dictionaries, as torch optimizers take them.
        base: The optimizer that descends: a class, or anything that makes one from `params`, such as
            `functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)`.
        rho: Radius of the ball in weight space (finite, at least 0).
        every: Perturb in every k-th step only, the first included; the others are the base's.
        base_options: Options of `base`, such as `lr=0.1`.

    Raises:
        ValueError: If `rho` is negative or not finite, or `every` is not an integer of at least 1.
        TypeError: If `base` is not a callable that returns a torch optimizer, or does not take `base_options`.
    """

    def __init__(self, params: Params, base: BaseOptimizer, rho: float, every: int = 1, **base_options: Any) -> None:
        self.every = check_integer("every", every)
        self._now = StepState()
        super().__init__(params, base, check_non_negative("rho", rho), base_options)

    @classmethod
    def around(
        cls, optimizer: Optimizer, names: nn.Module | Iterable[tuple[str, Tensor]] | None = None, **options: Any
    ) -> Self:
        """This method around an optimizer that exists: groups and state are shared, schedulers stay attached.

        Args:
            optimizer: Any torch optimizer; its groups get the key `rho` where they have none.
            names: The module, or pairs of names and parameters, for methods that go by names (ASAM's biases).
            options: The method's own, such as `rho`.

        Raises:
            TypeError: If `optimizer` is none, or has no such option.
            ValueError: If an earlier use has left another `rho` in the groups than is given.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{cls.__name__}.around takes a torch optimizer, got {type(optimizer).__name__}.")
        is_second = any("sharpness_step" in group for group in optimizer.param_groups)
        named = names.named_parameters() if isinstance(names, nn.Module) else names or ()
        sharp = cls(list(named), lambda _: optimizer, **options)
        if is_second and "rho" in options and options["rho"] not in sharp.own_radii():
            raise ValueError(
                f"{cls.__name__}.around was given rho={options['rho']}, and this {type(optimizer).__name__} keeps rho="
                f"{sharp.own_radii()[0]} from an earlier use: leave rho out, or set it in optimizer.param_groups."
            )
        return sharp

    def passes(
        self,
        losses: Losses,
        *,
        model: nn.Module | None = None,
        backward: Callable[[Tensor], object] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        second_pass: Literal["replay", "fresh"] = "replay",
    ) -> Tensor:
        """All passes of one step, with micro-batches, loss scaling and normalisation layers right.

            def losses():  # runs once for each pass
                for x, y in micro_batches:
                    yield loss_fn(model(x), y) / len(micro_batches)

            loss = optimizer.passes(losses, model=model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        Clears the gradients first, and leaves in them what descends. The second pass draws the random numbers of the
        first, and of `model` keeps what the first one left: running statistics and other buffers, metrics, counters.

        Args:
            losses: Gives the loss, or yields the losses of micro-batches, whose sum is the loss; called in each pass.
            model: What the losses run through; without it buffers are changed by both passes.
            backward: Runs the backward pass of a loss, such as `accelerator.backward`; by default `loss.backward()`.
            scaler: Scales the losses; an overflow in either pass then has `scaler.step(optimizer)` skip the step. If
                `backward` scales, it must be the scaler that `backward` uses.
            second_pass: `fresh` draws new random numbers in the second pass.

        Returns:
            The loss at w, 0-dimensional (at w + e of methods with one pass).
        """
        return run_passes(self, losses, backward, model, scaler, second_pass)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Descends: the base optimizer's step at w, with the gradients that are there.

        A closure is evaluated first, at w. It may run both passes itself; without `perturbed()` in it, its
        gradient replaces the one at w + e.
        """
        self._check("step()")
        now = self._now
        value = self._evaluate(closure) if closure is not None else None
        if not now.has_ascended:
            self._warn_of_plain_step()
        result = self.base.step()
        now.has_ascended, both, now.both = False, now.both, None
        if self._has_zero_rates():
            if self.memory:
                for weight in self._with_gradient():
                    self.state[weight].setdefault(self.memory, torch.zeros_like(weight))
        else:
            self._count_step()
            if both is not None and self.memory:
                self._renew(*both)
        return result if closure is None else value

    @torch.no_grad()
    def _renew(self, weights: list[Tensor], first: list[Tensor]) -> None:
        # Not before the base's first step: some take a parameter with any state for one that they have met.
        for weight in weights:
            self.state[weight].setdefault(self.memory, torch.zeros_like(weight))
        self.remember([self.state[weight][self.memory] for weight in weights], first)

    def _evaluate(self, closure: Callable[[], float]) -> float:
        """The closure's value: not every base takes one, and none knows of two passes."""
        had_ascended, before = self._now.has_ascended, GradientVersions(self._with_gradient())
        self._now.has_ascended = False
        with torch.enable_grad():
            value = closure()
        if had_ascended and not self._now.has_ascended:
            self._now.has_ascended = True
            if before.differ_from(self._with_gradient()):
                warnings.warn(
                    f"{type(self).__name__}.step(closure) after perturbed(): the closure has replaced the gradient "
                    "at w + e by one at w, so this is a plain step. Call step() without a closure, or perturb in it.",
                    stacklevel=3,
                )
        return value

    def _warn_of_plain_step(self) -> None:
        if self._now.has_warned or self._has_zero_rates() or not self._with_gradient() or not self.will_perturb():
            return
        self._now.has_warned = True
        warnings.warn(
            f"{type(self).__name__}.step() without perturbed() before it is a plain "
            f"{type(self.base).__name__} step. Run the second backward pass inside "
            "`with optimizer.perturbed():` (in Lightning: subclass SharpnessAwareModule).",
            stacklevel=3,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy begins between two steps."""
        self._now = StepState()
        super().__setstate__(state)


# Its hooks are the base's, which torch would else run twice.
SharpnessAware.step.hooked = True  # type: ignore[attr-defined]
