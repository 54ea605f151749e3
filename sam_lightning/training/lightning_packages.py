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
    return type(cls.__name__, (cls, twin.Callback), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})
