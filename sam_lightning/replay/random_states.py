"""The random number generators that a training step may draw from."""

import random
from typing import Any, TypeAlias

import numpy as np
import torch

RandomStates: TypeAlias = dict[str, Any]


def random_states() -> RandomStates:
    """The states of torch's, NumPy's and Python's global generators, and of every CUDA device in use."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
        "numpy": np.random.get_state(legacy=True),
        "python": random.getstate(),
    }


def set_random_states(states: RandomStates) -> None:
    """Sets the global generators to what `random_states` returned.

    CUDA's states are left alone where they are of another number of devices than there are now.
    """
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
