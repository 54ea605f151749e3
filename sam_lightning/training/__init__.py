"""How a LightningModule takes a sharp step: the two passes, clipping, schedules, resume, strategies.

Knows the optimizers of `optim` and Lightning; never a network, a data set or the command line.
"""

from sam_lightning.training.module import SharpnessAwareModule

__all__ = ["SharpnessAwareModule"]
