"""Measures of sharpness: of a network, a loss and data, whatever trained it.

Every measure takes `(network, loss, batches)`: `loss(batch)` computes the mean loss of a batch by `network`, and
`batches` are tensors, or tuples, lists and dictionaries of tensors whose first dimension counts samples. Networks,
gradients, modes, running statistics and random states are afterwards exactly as before, also after an exception.
In data-parallel training each process gives its own part of the data, and all get the measure of the whole.

Sharpness is no substitute for a test set: whether it goes with generalisation depends on the measure, on the
setting, and on what else differs between the networks that are compared; see M. Andriushchenko, F. Croce, M. Müller,
M. Hein, N. Flammarion. A modern look at the relationship between sharpness and generalization. ICML 2023.
arXiv 2302.07011.
"""

from sam_lightning.sharpness.adaptive import Adaptive
from sam_lightning.sharpness.average_case import average_case_sharpness
from sam_lightning.sharpness.eigenvalues import largest_eigenvalues
from sam_lightning.sharpness.lanczos import CurvatureError
from sam_lightning.sharpness.measures import Measures, Settings, Sharpness, measure
from sam_lightning.sharpness.objective import Estimate
from sam_lightning.sharpness.preserved_state import preserved_state
from sam_lightning.sharpness.trace import hessian_trace
from sam_lightning.sharpness.worst_case import worst_case_sharpness

__all__ = [
    "Adaptive",
    "CurvatureError",
    "Estimate",
    "Measures",
    "Settings",
    "Sharpness",
    "average_case_sharpness",
    "hessian_trace",
    "largest_eigenvalues",
    "measure",
    "preserved_state",
    "worst_case_sharpness",
]
