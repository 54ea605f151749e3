"""Two or more ways to do the same, measured in turn in one process: what slows the machine slows all of them."""

import statistics
from collections.abc import Callable

import pytest
import torch
from alternating import THREADS, clock, conditions

from sam_lightning.cli.malloc import keep_freed_memory


@pytest.fixture
def compare(benchmark, request):
    """Measures functions in turn; records medians, and of the first's ratio to each other within a round.

    A function does the work, or returns its own seconds as a float.
    """

    def run(
        rounds: int, functions: dict[str, Callable[[], object]], warmup: int = 1, **more: object
    ) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in functions}

        def measure() -> None:
            for i in range(-warmup, rounds):
                shift = i % len(functions)  # none is always behind the same other, whose caches it would find
                names = [*functions][shift:] + [*functions][:shift]
                for name in names:
                    function = functions[name]
                    begin = clock()
                    own = function()
                    took = own if isinstance(own, float) else clock() - begin
                    if i >= 0:
                        times[name].append(took)

        benchmark.pedantic(measure, rounds=1)
        first, *others = functions
        ratios = {
            other: statistics.median(a / b for a, b in zip(times[first], times[other], strict=True)) for other in others
        }
        benchmark.extra_info.update(
            {
                "n": rounds,
                "seconds": {name: statistics.median(values) for name, values in times.items()},
                "range": {name: [min(values), max(values)] for name, values in times.items()},
                "ratio": ratios,
                **conditions(),
                **more,
            }
        )
        shown = ", ".join(f"{ratio:.3f} of {name}" for name, ratio in ratios.items())
        print(f"\n{request.node.name}: {first} takes {statistics.median(times[first]):.4f} s, {shown}")
        return ratios

    return run


@pytest.fixture(autouse=True)
def _as_by_the_command_line():
    """Every core, where the default suite has one thread; freed memory is kept, for all that is measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    keep_freed_memory()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
