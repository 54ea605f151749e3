"""Slow float64 references, one scalar formula at a time, without torch.optim and without sam_lightning."""

import math

import torch
from torch import Tensor


def sam_displacements(weights: list[Tensor], grads: list[Tensor | None], radii: list[float]) -> list[Tensor]:
    """e_i = rho_i g_i / ||g||, the norm over all parameters that have a gradient and a radius."""
    square = 0.0
    for g, rho in zip(grads, radii, strict=True):
        if g is not None and rho > 0:
            for value in g.flatten().tolist():
                square += value * value
    length = math.sqrt(square) or 1.0
    displacements = []
    for w, g, rho in zip(weights, grads, radii, strict=True):
        values = [0.0] * w.numel() if g is None else g.flatten().tolist()
        displacements.append(shaped([rho * v / length for v in values], w))
    return displacements


def asam_displacements(
    weights: list[Tensor],
    grads: list[Tensor | None],
    radii: list[float],
    names: list[str],
    eta: float,
    normalize_bias: bool,
) -> list[Tensor]:
    """e_i = rho_i T_i^2 g_i / ||T g|| with T = |w| + eta, but 1 for biases unless they are normalised."""
    scales = []
    for w, name in zip(weights, names, strict=True):
        own_name = name.split(".")[-1]
        scaled = normalize_bias or "bias" not in own_name
        scales.append([abs(v) + eta if scaled else 1.0 for v in w.flatten().tolist()])
    square = 0.0
    for g, rho, scale in zip(grads, radii, scales, strict=True):
        if g is not None and rho > 0:
            square += sum((t * v) ** 2 for t, v in zip(scale, g.flatten().tolist(), strict=True))
    length = math.sqrt(square) or 1.0
    displacements = []
    for w, g, rho, scale in zip(weights, grads, radii, scales, strict=True):
        values = [0.0] * w.numel() if g is None else g.flatten().tolist()
        displacements.append(shaped([rho * t * t * v / length for t, v in zip(scale, values, strict=True)], w))
    return displacements


def shaped(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view_as(like)


class SGD:
    """v <- mu v + g + lambda w;  w <- w - lr v."""

    def __init__(self, lr: float, momentum: float = 0.0, weight_decay: float = 0.0):
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.velocity: dict[int, Tensor] = {}

    def update(self, i: int, w: Tensor, g: Tensor, lr: float | None) -> Tensor:
        g = g + self.weight_decay * w
        if self.momentum:
            g = self.momentum * self.velocity[i] + g if i in self.velocity else g
            self.velocity[i] = g
        return w - (self.lr if lr is None else lr) * g

    def momentum_of(self, i: int) -> Tensor | None:
        return self.velocity.get(i)


class Adam:
    """m, v: moving means of g and g^2;  w <- (1 - lr lambda) w - lr m_hat / (sqrt(v_hat) + eps)."""

    def __init__(self, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, decay: float = 0.0):
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, decay
        self.moments: dict[int, tuple[int, Tensor, Tensor]] = {}

    def update(self, i: int, w: Tensor, g: Tensor, lr: float | None) -> Tensor:
        step, m, v = self.moments.get(i, (0, torch.zeros_like(w), torch.zeros_like(w)))
        a, b = self.betas
        step, m, v = step + 1, a * m + (1 - a) * g, b * v + (1 - b) * g * g
        self.moments[i] = (step, m, v)
        m_hat, v_hat = m / (1 - a**step), v / (1 - b**step)
        lr = self.lr if lr is None else lr
        return w - lr * self.decay * w - lr * m_hat / (v_hat.sqrt() + self.eps)

    def momentum_of(self, i: int) -> Tensor | None:
        return self.moments[i][1] if i in self.moments else None


def sharpness_aware_steps(steps, parameters, loss, method, base, radii, rates):
    """Trains `parameters` (changed in place) for `steps` steps; `loss()` is evaluated at their values."""
    for t in range(steps):
        weights = [p.detach().clone() for p in parameters]
        first = gradients(parameters, loss)
        if t % method.every == 0 and any(radii):
            for p, w, e in zip(parameters, weights, method.displacements(weights, first, radii, base), strict=True):
                p.data = w + e
            descent = method.descends(first, gradients(parameters, loss))
        else:
            descent = method.between(first, radii)
        for i, (p, w, g) in enumerate(zip(parameters, weights, descent, strict=True)):
            p.data = w if g is None else base.update(i, w, g, rates[i])


def gradients(parameters, loss) -> list[Tensor | None]:
    trained = [p for p in parameters if p.requires_grad]
    found = dict(zip(map(id, trained), torch.autograd.grad(loss(), trained, allow_unused=True), strict=True))
    return [found.get(id(p)) for p in parameters]


def curvature(function, weights: list[Tensor], scales: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Gradient (P,) and full Hessian (P, P) of `function(weights)` in u = e / T, by torch.func.

    `scales` are T; without them T = 1. Backwards twice: forwards, torch is wrong through batch statistics.
    """
    sizes = [w.numel() for w in weights]
    flat = torch.cat([w.detach().flatten() for w in weights])
    T = torch.ones_like(flat) if scales is None else torch.cat([t.flatten() for t in scales])

    def of_vector(u: Tensor) -> Tensor:
        moved = (flat + T * u).split(sizes)
        return function([part.view_as(w) for part, w in zip(moved, weights, strict=True)])

    origin = torch.zeros_like(flat)
    return torch.func.grad(of_vector)(origin), torch.func.jacrev(torch.func.grad(of_vector))(origin)


def highest_in_ball(gradient: Tensor, hessian: Tensor, rho: float) -> float:
    """max g u + u H u / 2 over ||u|| <= rho, for H with a positive eigenvalue: the maximum is on the sphere.

    There (mu - H) u = g with mu at least the largest eigenvalue, and mu is found by bisection of ||u|| = rho. Where g
    has no part along the largest eigenvector, u may have one besides.
    """
    values, vectors = torch.linalg.eigh(hessian)
    g = (vectors.T @ gradient).tolist()
    values = values.tolist()
    top = values[-1]

    def u(mu: float) -> list[float]:
        return [c / (mu - v) if c else 0.0 for c, v in zip(g, values, strict=True)]

    if max(abs(c) for c in g) == 0:
        return rho**2 * top / 2
    low, high = top, top + math.sqrt(sum(c * c for c in g)) / rho + 1.0
    for _ in range(200):
        mu = (low + high) / 2
        too_long = mu <= top or sum(c * c for c in u(mu)) > rho**2
        low, high = (mu, high) if too_long else (low, mu)
    at = u(high)
    return sum(c * a + v * a * a / 2 for c, v, a in zip(g, values, at, strict=True))
