"""An optimizer around another one, which stays the owner of groups, state and hooks."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class OptimizerWrapper(Optimizer):
    """Everything that torch expects of an optimizer, handed on to `base`; all but `step`.

    Options of a subclass are public attributes set by its constructor, so that copies and pickles have them. They
    have no default in the class: Lightning's wrapper around optimizers would see the default, not the value.
    """

    base: Optimizer

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        # Unpickling is torch's own way to equip an optimizer whose groups and state already exist; its
        # constructor would replace them.
        super().__setstate__({})

    def _check(self, what: str) -> None:
        """Raises if `what` may not happen now."""

    # Groups, state and defaults are the base optimizer's own objects.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's state."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict; there is no other state to save."""
        self._check("state_dict()")
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer or of its plain base."""
        self._check("load_state_dict()")
        self.base.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, as the base optimizer does."""
        self.base.zero_grad(set_to_none)

    def train(self) -> None:
        """Puts a base optimizer that has two modes (schedule-free ones) into the one for training."""
        self._switch("train")

    def eval(self) -> None:
        """Puts a base optimizer that has two modes (schedule-free ones) into the one for evaluation."""
        self._switch("eval")

    def _switch(self, mode: str) -> None:
        if hasattr(self.base, mode):  # others may be asked at any time: some trainers do before every pass
            self._check(f"{mode}()")
            getattr(self.base, mode)()

    # Hooks run where the work is done, once, and are given this optimizer.

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """As torch's; runs when the gradient is ready, after a closure."""
        return self.base.register_step_pre_hook(self._mine(hook))

    def register_step_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """As torch's."""
        return self.base.register_step_post_hook(self._mine(hook))

    def register_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """As torch's."""
        return self.base.register_state_dict_pre_hook(self._mine(hook), prepend)

    def register_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """As torch's."""
        return self.base.register_state_dict_post_hook(self._mine(hook), prepend)

    def register_load_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """As torch's."""
        return self.base.register_load_state_dict_pre_hook(self._mine(hook), prepend)

    def register_load_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """As torch's."""
        return self.base.register_load_state_dict_post_hook(self._mine(hook), prepend)

    def _mine(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda base, *args: hook(self, *args)

    def __getstate__(self) -> dict[str, Any]:
        """The options and the base; what is private lasts a step at most, or is torch's own, such as hooks."""
        self._check("copying or pickling")
        # A learning rate scheduler puts a counting `step` on the instance.
        return {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "step"}
