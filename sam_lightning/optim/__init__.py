"""Sharpness-aware optimizers: one shell around any torch optimizer, one formula per method. Knows torch only."""

from sam_lightning.optim.asam import ASAM
from sam_lightning.optim.friendly_sam import FriendlySAM
from sam_lightning.optim.gsam import GSAM
from sam_lightning.optim.look_sam import LookSAM
from sam_lightning.optim.msam import MSAM
from sam_lightning.optim.norm_layers import norm_layers_only
from sam_lightning.optim.parameter_groups import BaseOptimizer, Params
from sam_lightning.optim.radius_schedules import Progress, RadiusSchedule, follow_lr, late, warm_up
from sam_lightning.optim.sam import SAM
from sam_lightning.optim.sharpness_aware import SharpnessAware
from sam_lightning.optim.vasso import VaSSO
from sam_lightning.optim.wsam import WSAM

__all__ = [
    "ASAM",
    "GSAM",
    "MSAM",
    "SAM",
    "WSAM",
    "BaseOptimizer",
    "FriendlySAM",
    "LookSAM",
    "Params",
    "Progress",
    "RadiusSchedule",
    "SharpnessAware",
    "VaSSO",
    "follow_lr",
    "late",
    "norm_layers_only",
    "warm_up",
]
