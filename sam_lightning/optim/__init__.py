"""Sharpness-aware optimizers: one shell around any torch optimizer, one formula per variant."""

from sam_lightning.optim.asam import ASAM
from sam_lightning.optim.base import SharpnessAware
from sam_lightning.optim.groups import BaseOptimizer, Params
from sam_lightning.optim.norms import global_norm
from sam_lightning.optim.sam import SAM

__all__ = ["ASAM", "SAM", "BaseOptimizer", "Params", "SharpnessAware", "global_norm"]
