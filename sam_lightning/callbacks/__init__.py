"""What is kept and shown while training: histories, histograms, hyperparameters, sharpness.

Callbacks watch a training; how a step is taken is `training`'s.
"""

from sam_lightning.callbacks.histograms import WeightHistograms
from sam_lightning.callbacks.history import EpochHistory
from sam_lightning.callbacks.hyperparameters import HyperparameterPage
from sam_lightning.callbacks.last_checkpoint import LastCheckpoint
from sam_lightning.callbacks.random_states import RandomStates
from sam_lightning.callbacks.sharpness_monitor import SharpnessMonitor

__all__ = [
    "EpochHistory",
    "HyperparameterPage",
    "LastCheckpoint",
    "RandomStates",
    "SharpnessMonitor",
    "WeightHistograms",
]
