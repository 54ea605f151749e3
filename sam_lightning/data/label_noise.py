"""Wrong labels on purpose: the classical test of whether training memorises."""

import torch
from torch import Tensor

from sam_lightning.data.sampler import LABEL_NOISE, generator_of


def redraw(labels: Tensor, classes: int, probability: float, seed: int) -> Tensor:
    """Redraws each label, independently with the given probability, uniformly over all classes.

    This is symmetric (uniform) label noise as in Zhang et al. and Jiang et al., whose setting Foret et al. (section
    3.3) follow. A redrawn label may hit the true class: of C classes, a share of `probability` * (C - 1) / C becomes
    wrong, with ten classes and 0.4 about 36 %. Samples that a smaller probability redraws, a larger one redraws to
    the same class.

    Args:
        labels: int64, (N,).
        classes: Number of classes, C.
        probability: In [0, 1].
        seed: At least 0; labels are a function of this seed and their position alone.

    Returns:
        (N,), int64; `labels` itself is left as it is.

    Reference:
        C. Zhang et al. Understanding Deep Learning Requires Rethinking Generalization. ICLR 2017.
        L. Jiang et al. MentorNet. ICML 2018. P. Foret et al. Sharpness-Aware Minimization. ICLR 2021.
    """
    generator = generator_of(seed, 0, LABEL_NOISE)
    is_redrawn = torch.rand(len(labels), generator=generator) < probability
    drawn = torch.randint(classes, (len(labels),), generator=generator)
    return torch.where(is_redrawn, drawn, labels)
