"""What sharpness-aware minimization keeps in parameter groups: each one's radius, and the count of steps."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from sam_lightning.optim.checks import check_non_negative
from sam_lightning.optim.wrapper import OptimizerWrapper

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
BaseOptimizer: TypeAlias = Callable[..., Optimizer]


class RadiusGroups(OptimizerWrapper):
    """A base optimizer whose groups have a radius, `rho` by default, and `sharpness_step`, the steps taken so far.

    Attributes:
        rho: The radius of groups that bring none.
        radius_key: The radius's key in the groups: "rho", or "sam_rho" where the base has a `rho` of its own.
        names: The name of every parameter whose name is known. Decided when a parameter joins: what a state dict
            calls it does not matter.
    """

    def __init__(self, params: Params, base: BaseOptimizer, rho: float, options: dict[str, Any]) -> None:
        given: list[Any] = list(params)
        super().__init__(_make(type(self).__name__, given, base, options))
        self.rho = rho
        self.radius_key = "sam_rho" if "rho" in self.base.defaults else "rho"
        self.names: dict[Tensor, str] = {p[1]: p[0] for p in given if isinstance(p, tuple)}
        for group in self.param_groups:
            self._join(group)

    def radius(self, group: dict[str, Any]) -> float:
        """The radius of one of the groups, or of one that is to join them: there it may be called `sam_rho`, too."""
        return check_non_negative("rho", group.get("sam_rho", group.get(self.radius_key, self.rho)))

    def own_radii(self) -> list[float]:
        """Each group's radius, without the factor of a schedule."""
        return [group.get("initial_rho", self.radius(group)) for group in self.param_groups]

    @property
    def steps(self) -> int:
        """Steps really taken, from the groups and so from the checkpoint."""
        return self.param_groups[0].get("sharpness_step", 0) if self.param_groups else 0

    def _count_step(self) -> None:
        steps = self.steps + 1
        for group in self.param_groups:
            group["sharpness_step"] = steps

    def _has_zero_rates(self) -> bool:
        """Whether every learning rate is 0: how torch.distributed.checkpoint has state made to load into."""
        rates = [group.get("lr") for group in self.param_groups]
        # A rate on an accelerator is not looked at, which would make the host wait.
        known = [rate for rate in rates if not isinstance(rate, Tensor) or rate.device.type == "cpu"]
        return len(known) == len(rates) and all(rate == 0 for rate in known)

    def _join(self, group: dict[str, Any]) -> None:
        self._settle_radius(group)
        group.setdefault("sharpness_step", self.steps)
        self.names.update(zip(group["params"], group.get("param_names", ()), strict=False))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer, with this optimizer's `rho` where it brings none.

        Its parameters may have names or not, whatever the other groups have.
        """
        self._check("add_param_group()")
        self.radius(param_group)
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        self.names.update({p[1]: p[0] for p in params if isinstance(p, tuple)})
        params = [p[1] if isinstance(p, tuple) else p for p in params]
        if self.param_groups and "param_names" in self.param_groups[0]:
            taken = sum(len(group["params"]) for group in self.param_groups)
            params = [(self.names.get(p, f"parameter.{i}"), p) for i, p in enumerate(params, taken)]
        self.base.add_param_group({**param_group, "params": params})
        group = self.param_groups[-1]
        self._settle_radius(group)
        group["sharpness_step"] = self.steps

    def _settle_radius(self, group: dict[str, Any]) -> None:
        rho = self.radius(group)
        group.pop("sam_rho", None)
        group[self.radius_key] = rho

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer, radii included, or of its plain base, which keeps the present ones."""
        radii = [self.radius(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, rho in zip(self.param_groups, radii, strict=True):
            group.setdefault(self.radius_key, rho)


def _make(method: str, params: list[Any], base: BaseOptimizer, options: dict[str, Any]) -> Optimizer:
    if not callable(base):  # an optimizer that is already built is not, either
        raise TypeError(
            f"base must be a torch optimizer's class or another callable from parameters to one, such as "
            f"functools.partial(torch.optim.SGD, lr=0.1), got {type(base).__name__}."
        )
    try:
        made = base(params, **options)
    except TypeError as error:
        if not options:
            raise
        raise TypeError(f"{method} hands {', '.join(options)} on to its base: {error}") from error
    if not isinstance(made, Optimizer) or isinstance(made, RadiusGroups):
        raise TypeError(f"base must return a plain torch optimizer, got {type(made).__name__}.")
    if isinstance(made, LBFGS):
        raise TypeError(
            f"{method} cannot have LBFGS as its base, which evaluates the loss many times in one step, where "
            "there is one perturbation: take another base, such as torch.optim.SGD."
        )
    return made
