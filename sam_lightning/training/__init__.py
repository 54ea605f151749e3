"""How a LightningModule takes a sharp step: two passes, one perturbation, and all else as Lightning does it.

Knows the optimizers of `optim` and Lightning; never a network, a data set or the command line.
"""

from sam_lightning.training.callback import SharpnessAwareTraining
from sam_lightning.training.module import SharpnessAwareModule

__all__ = ["SharpnessAwareModule", "SharpnessAwareTraining"]
