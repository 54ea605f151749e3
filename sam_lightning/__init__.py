"""Sharpness-aware minimization for PyTorch and PyTorch Lightning.

Importing this package imports torch and never Lightning; what needs Lightning lies in the rooms beside `optim` and
`sharpness`, `sam_lightning.training` first of all.
"""

from sam_lightning.optim import ASAM, SAM, SharpnessAware

__all__ = ["ASAM", "SAM", "SharpnessAware"]
