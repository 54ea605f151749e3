"""The ways into sharp training, taken with one and the same module of a library."""

import warnings
from collections.abc import Sequence
from typing import Any

from sam_lightning import SAM
from sam_lightning.training import SharpnessAwareModule, SharpnessAwareTraining
from written_out import Run, assert_same, run, written_out

DOORS = ("callback", "base class in front", "base class behind")
RHO = 0.05


def as_it_is(cls: Any) -> Any:
    """The library's class itself."""
    return cls


def assert_sharp(
    make: Any, data: Any, tmp_path: Any, doors: Sequence[str] = DOORS, says: str | None = None, **options: Any
) -> Run:
    """Through each door the module trains as where the two passes are written out, and nothing is complained of.

    Args:
        make: Builds the module out of what its argument makes of each class; `make()` is the library's module.
        data: Gives what `Trainer.fit` takes as keyword arguments.
        tmp_path: The test's folder.
        doors: Those to try.
        says: A part of the one warning that is due.
        options: The Trainer's.
    """
    expected = written_out(make, data, tmp_path, RHO, **options)
    for door in doors:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sharp = _sharp_run(door, make, data, tmp_path, **options)
        said = [str(w.message) for w in caught if "sam_lightning" in w.filename or "second pass" in str(w.message)]
        assert [text for text in said if says is None or says not in text] == [], door
        assert says is None or len(said) == 1, door
        assert_same(sharp, expected)
    return sharp


def _sharp_run(door: str, make: Any, data: Any, tmp_path: Any, **options: Any) -> Run:
    if door == "callback":
        return run(make, data, [SharpnessAwareTraining(SAM, rho=RHO)], tmp_path, **options)

    def with_base_class(cls: Any) -> Any:
        bases = (SharpnessAwareModule, cls) if door == "base class in front" else (cls, SharpnessAwareModule)
        return type(cls.__name__, bases, {"rho": RHO})

    return run(lambda: make(with_base_class), data, [], tmp_path, **options)
