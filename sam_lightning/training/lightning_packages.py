"""Lightning under both of its names: half of the public modules import `pytorch_lightning`."""

import sys
from typing import TypeVar

from lightning.pytorch import Callback

C = TypeVar("C", bound=Callback)


def of_both_packages(cls: type[C]) -> type[C]:
    """`cls`, and where `pytorch_lightning` is in use a callback of that package, too: its Trainer takes no others."""
    twin = sys.modules.get("pytorch_lightning")
    if twin is None or issubclass(cls, twin.Callback):
        return cls
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    # Pickled, as for processes that a Trainer spawns, it is `cls`: no module has the class that is made here.
    return type(cls.__name__, (cls, twin.Callback), {**names, "__reduce__": lambda self: (_new, (cls,), vars(self))})


def _new(cls: type[C]) -> C:
    """An instance without its attributes, which unpickling sets."""
    made = cls.__new__(cls)
    made.__class__ = of_both_packages(cls)
    return made
