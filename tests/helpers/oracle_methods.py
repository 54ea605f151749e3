"""Every method written out in float64, one scalar formula at a time, without torch.optim and without sam_lightning.

A vector is a list with one tensor per parameter, or None where there is no gradient.
"""

import math

from oracles import asam_displacements, sam_displacements


def norm(vector):
    return math.sqrt(inner(vector, vector))


def inner(a, b):
    total = 0.0
    for x, y in zip(a, b, strict=True):
        if x is not None and y is not None:
            total += sum(p * q for p, q in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True))
    return total


def combined(a, x, b, y):
    """A x + b y, where there are both; else what is in y."""
    return [q if p is None or q is None else a * p + b * q for p, q in zip(x, y, strict=True)]


class Sam:
    """e = rho g / ||g||; descends along g_e.

    A method's oracle has these four functions; `oracles.sharpness_aware_steps` calls them. Their lists have one entry
    for every parameter of the network, frozen ones included, in one order. In `g` and `g_e`, the gradients at w and at
    w + e, an entry is None where a parameter has no gradient, and so it may be in what `descends` and `between` return.
    """

    def __init__(self, names, every=1):
        """Gets the parameters' names, then the options of the case's row."""
        self.every = every

    def displacements(self, weights, g, radii, base):
        """All of e, zeros where nothing moves, never None.

        `radii` has each parameter's rho, which may be 0; `base.momentum_of(i)` is the i-th one's momentum, or None. It
        is called once in each step that perturbs, so that a memory may be renewed here.
        """
        return sam_displacements(weights, g, radii)

    def descends(self, g, g_e):
        """What the base gets in a step that perturbs."""
        return g_e

    def between(self, g, radii):
        """What it gets in the others: those between the steps of `every`, and all if every radius is 0."""
        return g


class Asam(Sam):
    """e = rho T^2 g / ||T g||."""

    def __init__(self, names, eta, normalize_bias, every=1):
        super().__init__(names, every)
        self.scale = (names, eta, normalize_bias)

    def displacements(self, weights, g, radii, base):
        return asam_displacements(weights, g, radii, *self.scale)


class Msam(Sam):
    """e = -rho v / ||v||, v the base's momentum; parameters without a gradient have none."""

    def displacements(self, weights, g, radii, base):
        v = [base.momentum_of(i) for i in range(len(weights))]
        return sam_displacements(weights, [None if m is None else -m for m in v], radii)


class Wsam(Sam):
    """Descends along (1 - a) g + a g_e, a = gamma / (1 - gamma)."""

    def __init__(self, names, gamma, every=1):
        super().__init__(names, every)
        self.a = gamma / (1 - gamma)

    def descends(self, g, g_e):
        return combined(1 - self.a, g, self.a, g_e)


class Gsam(Sam):
    """Descends along g_e - alpha (g - <g, u> u), u = g_e / ||g_e||."""

    def __init__(self, names, alpha, every=1):
        super().__init__(names, every)
        self.alpha = alpha

    def descends(self, g, g_e):
        length = norm(g_e)
        u = [None if x is None else x / length for x in g_e]
        along = inner(g, u)
        orthogonal = [None if x is None or y is None else x - along * y for x, y in zip(g, u, strict=True)]
        return combined(-self.alpha, orthogonal, 1.0, g_e)


class Friendly(Sam):
    """m <- lmbda m + (1 - lmbda) g;  e along g - sigma m."""

    def __init__(self, names, sigma, lmbda, every=1):
        super().__init__(names, every)
        self.sigma, self.lmbda, self.m = sigma, lmbda, {}

    def displacements(self, weights, g, radii, base):
        direction = []
        for i, x in enumerate(g):
            if x is not None:
                self.m[i] = self.lmbda * self.m.get(i, 0 * x) + (1 - self.lmbda) * x
            direction.append(None if x is None else x - self.sigma * self.m[i])
        return sam_displacements(weights, direction, radii)


class Vasso(Sam):
    """d <- (1 - theta) d + theta g;  e along d."""

    def __init__(self, names, theta, every=1):
        super().__init__(names, every)
        self.theta, self.d = theta, {}

    def displacements(self, weights, g, radii, base):
        for i, x in enumerate(g):
            if x is not None:
                self.d[i] = (1 - self.theta) * self.d.get(i, 0 * x) + self.theta * x
        return sam_displacements(weights, [None if x is None else self.d[i] for i, x in enumerate(g)], radii)


class Look(Sam):
    """g_v = g_e - <g_e, u> u, u = g / ||g||; between: g + alpha ||g|| g_v / ||g_v||."""

    def __init__(self, names, alpha, every):
        super().__init__(names, every)
        self.alpha, self.flat = alpha, None

    def descends(self, g, g_e):
        length = norm(g)
        u = [None if x is None else x / length for x in g]
        along = inner(g_e, u)
        g_v = [None if x is None or y is None else x - along * y for x, y in zip(g_e, u, strict=True)]
        length = norm(g_v)
        self.flat = [None if x is None else x / length for x in g_v]
        return g_e

    def between(self, g, radii):
        if self.flat is None or not any(radii):
            return g
        return combined(self.alpha * norm(g), self.flat, 1.0, g)
