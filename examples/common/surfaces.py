# SPDX-License-Identifier: Apache-2.0
"""Three classic surfaces, and the path that an optimizer takes down each."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.patches import Circle


class Surface(NamedTuple):
    """A loss of a point `[2]`, 0 at the minima, and the limits of the picture.

    An optimizer has settled when it stays within `radius` of a minimum.
    """

    name: str
    loss: Callable[[jax.Array], jax.Array]
    start: tuple[float, float]
    minima: tuple[tuple[float, float], ...]
    radius: float
    xlim: tuple[float, float]
    ylim: tuple[float, float]


def ravine(point: jax.Array) -> jax.Array:
    x, y = point
    # Turned by 20 degrees: along the axes, a scale per coordinate would make it round.
    cos, sin = math.cos(math.radians(20)), math.sin(math.radians(20))
    return (cos * x + sin * y) ** 2 / 50 + (cos * y - sin * x) ** 2


def saddle(point: jax.Array) -> jax.Array:
    x, y = point
    return x**2 + (y**2 - 1) ** 2 / 2


def beale(point: jax.Array) -> jax.Array:
    x, y = point
    return (
        (1.5 - x + x * y) ** 2
        + (2.25 - x + x * y**2) ** 2
        + (2.625 - x + x * y**3) ** 2
    )


RAVINE = Surface(
    "Ravine",
    ravine,
    start=(-8.0, -1.0),
    minima=((0.0, 0.0),),
    radius=0.5,
    xlim=(-8.9, 1.6),
    ylim=(-5.2, 2.3),
)
SADDLE = Surface(
    "Saddle",
    saddle,
    start=(-1.4, 0.01),
    minima=((0.0, -1.0), (0.0, 1.0)),
    radius=0.1,
    xlim=(-1.6, 0.85),
    ylim=(-0.3, 1.45),
)
BEALE = Surface(
    "Beale",
    beale,
    start=(4.0, -1.0),
    minima=((3.0, 0.5),),
    radius=0.2,
    xlim=(0.92, 4.42),
    ylim=(-1.22, 1.28),
)
ALL = (RAVINE, SADDLE, BEALE)


def descend(
    optimizer: optax.GradientTransformation,
    surface: Surface,
    start: jax.Array,
    num_steps: int,
) -> jax.Array:
    """The points `[num_steps + 1, 2]` that an optimizer visits, from `start` on."""

    def step(carry: Any, _: None) -> Any:
        point, state = carry
        gradient = jax.grad(surface.loss)(point)
        updates, state = optimizer.update(gradient, state, point)
        point = optax.apply_updates(point, updates)
        return (point, state), point

    carry = (start, optimizer.init(start))
    _, points = jax.lax.scan(step, carry, length=num_steps)
    return jnp.concatenate([start[None], points])


def num_steps_to_settle(surface: Surface, path: jax.Array) -> jax.Array:
    """Steps after which a path `[num_steps + 1, 2]` stays near a minimum.

    One more than the path has, if it never settles.
    """
    offsets = path[:, None] - jnp.asarray(surface.minima)
    distances = jnp.linalg.norm(offsets, axis=-1).min(axis=-1)
    away = ~(distances < surface.radius)  # NaN is away
    return jnp.where(away, jnp.arange(1, len(path) + 1), 0).max()


def draw(axes: Axes, surface: Surface) -> None:
    """Draws contours, the start, the minima and the radius of settling."""
    x, y = np.meshgrid(np.linspace(*surface.xlim, 241), np.linspace(*surface.ylim, 241))
    loss = jax.vmap(jax.vmap(surface.loss))(jnp.stack([x, y], -1))
    # Spreads out the contours as a logarithm would, but ends at the minimum.
    height = np.asarray(loss**0.25)
    axes.contour(x, y, height, levels=14, colors="0.85", linewidths=1, zorder=0)
    axes.plot(*surface.start, marker="o", ms=7, mfc="white", mec="0.2", zorder=5)
    for minimum in surface.minima:
        axes.add_patch(Circle(minimum, surface.radius, fill=False, ec="0.2", zorder=5))
    axes.set(xlim=surface.xlim, ylim=surface.ylim, xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_color("0.85")
