"""The largest eigenvalues of a symmetric operator, with vectors of its own precision on its own device."""

from collections.abc import Callable

import torch
from torch import Tensor

_CHUNK = 2**14  # entries of vectors that are worked on at once, in float64 or in new memory
_MOST_PRODUCTS = 1000


class CurvatureError(RuntimeError):
    """Second derivatives that are not finite, not there, or wrong, or eigenvalues that are not found."""


def inner(vectors: Tensor, vector: Tensor) -> Tensor:
    """Inner products of (K, P) with (P,): (K,), in float64."""
    chunks = zip(torch.split(vectors, _CHUNK, dim=1), torch.split(vector, _CHUNK), strict=True)
    return torch.stack([rows.double() @ part.double() for rows, part in chunks]).sum(0)


def largest(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    count: int,
    tolerance: float,
    inner: Callable[[Tensor, Tensor], Tensor] = inner,
) -> list[float]:
    r"""The largest eigenvalues of a symmetric A of (P, P), the largest first, by thick-restart Lanczos.

    $q_1$ is the normalised start. Each step adds the part of $A q_j$ that is orthogonal to $q_1 \dots q_j$, as
    $q_{j+1}$ with its length $\beta_j$. The eigenvalues θ of the small matrix $q_i^\top A q_j$, with eigenvectors s,
    approach those of A: within $\beta_j |s_j|$ of every θ lies one. When the basis is full, it starts anew from the
    vectors $\sum_j s_j q_j$ of the largest θ. Every new vector is made orthogonal to all others, twice.

    Args:
        product: A times a vector (P,), in new memory.
        start: A vector (P,) with a part along every eigenvector, such as a random one.
        count: How many, at most P.
        tolerance: Ends when $\beta_j |s_j| \le$ tolerance |θ| for all of them.
        inner: Inner products of (K, P) with (P,), in float64.

    Raises:
        CurvatureError: If a product is not finite, or 1000 are not enough.

    Memory: 2 `count` + 7 vectors, and two for a product. An eigenvalue that A has several times may be found fewer
    times, unless rounding brings the others in.

    Reference:
        K. Wu, H. Simon. Thick-Restart Lanczos Method for Large Symmetric Eigenvalue Problems. SIAM Journal on Matrix
        Analysis and Applications 22, 2000.
    """
    size = min(2 * count + 6, len(start))
    q = start.new_empty(size + 1, len(start))
    q[0] = start / inner(start[None], start).sqrt()
    del start  # memory
    A = torch.zeros(size, size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    kept = products = 0
    while True:
        for j in range(kept, size):
            if products == _MOST_PRODUCTS:
                raise CurvatureError(
                    f"{products} products with the matrix did not find its {count} largest eigenvalues: raise the "
                    f"tolerance, now {tolerance}."
                )
            column, beta = _orthogonalise(q[: j + 1], product(q[j]), q[j + 1], inner)
            products += 1
            A[: j + 1, j] = A[j, : j + 1] = column
            if not A.isfinite().all():
                raise CurvatureError("a product with the matrix is not finite.")
            values, s = torch.linalg.eigh(A[: j + 1, : j + 1])
            values, s = values.flip(0), s.flip(1)
            errors = beta * s[j, :count].abs()
            # A maps the span of the basis into itself, and what is left is rounding: no direction to go on in.
            is_invariant = beta <= 100 * torch.finfo(q.dtype).eps * float(values.abs().max())
            is_found = j + 1 == size if is_invariant else bool((errors <= tolerance * values[:count].abs()).all())
            if j + 1 >= count and is_found:
                return [float(value) for value in values[:count]]
            if is_invariant:
                other = torch.randn(q.shape[1], generator=generator, dtype=q.dtype).to(q.device)
                _orthogonalise(q[: j + 1], other, q[j + 1], inner)
        kept = count + (size - count) // 2
        rotation = s[:, :kept].T.to(q)
        for rows in torch.split(q, _CHUNK, dim=1):
            rows[:kept] = rotation @ rows[:size]
        q[kept] = q[size]
        A.zero_()
        A.diagonal()[:kept] = values[:kept]


def _orthogonalise(
    basis: Tensor, vector: Tensor, into: Tensor, inner: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, float]:
    """Writes the normalised part of the vector orthogonal to the basis; its coefficients, and the part's length."""
    coefficients = torch.zeros(len(basis), dtype=torch.float64)
    for _ in range(2):  # the first time leaves as much as it rounds
        found = inner(basis, vector)
        vector.addmv_(basis.T, found.to(vector), alpha=-1)
        coefficients += found.cpu()
    length = float(inner(vector[None], vector).sqrt())
    torch.div(vector, length or 1.0, out=into)
    return coefficients, length
