"""A set cut in two with the same shares of classes."""

import numpy as np
import torch
from torch import Tensor

from sam_lightning.runs.extras import require


def stratified_split(labels: Tensor, held_out: int | float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of the part that is kept and of the part that is held out, each in ascending order.

    Args:
        labels: (N,); both parts have its shares of classes.
        held_out: Size of the second part: a number of samples, or a fraction in (0, 1).
        seed: Seed of the split.
    """
    require("studies", "A stratified split (validation: split)", "sklearn")
    # Only here: scikit-learn takes a fifth of a second to import, which --help need not wait for.
    from sklearn.model_selection import train_test_split

    parts = train_test_split(np.arange(len(labels)), test_size=held_out, stratify=labels.numpy(), random_state=seed)
    kept, out = (torch.from_numpy(np.sort(part)) for part in parts)
    return kept, out
