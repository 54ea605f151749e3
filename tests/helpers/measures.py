"""Every measure as a function of (network, loss, batches) that gives one number."""

from functools import partial

from sam_lightning.sharpness import average_case_sharpness, hessian_trace, largest_eigenvalues, worst_case_sharpness

MEASURES = {
    "eigenvalue": lambda *what, **options: largest_eigenvalues(*what, tolerance=1e-9, **options)[0],
    "trace": lambda *what, **options: hessian_trace(*what, draws=3, **options).mean,
    "one step": partial(worst_case_sharpness, rho=0.1),
    "worst case": partial(worst_case_sharpness, rho=0.1, steps=5),
    "average case": lambda *what, **options: average_case_sharpness(*what, sigma=0.1, draws=3, **options).mean,
}
