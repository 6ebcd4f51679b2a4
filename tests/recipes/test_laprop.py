# SPDX-License-Identifier: Apache-2.0
"""`recipes.laprop` and `recipes.dreamer_v3` against float64 written from their sources.

The reference of LaProp is Algorithm 1 of Ziyin et al. (2020). That of DreamerV3 is
``dreamerv3/agent.py`` at e3f0224869, with the options of ``configs.yaml``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import reference
from helpers.running import run

from optax_rms import recipes

BOUND = 2e-5
STEPS = 75
RATES = (1e-2 * (1.5 + np.sin(np.arange(STEPS)))).astype(np.float32)


def laprop(
    gradients,
    rates,
    b1=0.9,
    b2=0.999,
    eps=1e-15,
    *,
    eps_in_sqrt=False,
    corrects_squares=True,
    corrects_mean=True,
    averages_first=False,
    averages_rates=False,
):
    """The sums of all steps so far; the options are the rules of others."""
    v = m = average_rate = np.zeros(gradients.shape[1:])
    path = []
    for t, (g, rate) in enumerate(zip(np.float64(gradients), rates, strict=True), 1):
        v = b2 * v + (1 - b2) * g**2
        x = v / (1 - b2**t) if corrects_squares else v
        root = np.sqrt(x + eps) if eps_in_sqrt else np.sqrt(x) + eps
        total = 1 - b1**t if corrects_mean else 1.0
        if averages_first:  # Adam
            m = b1 * m + (1 - b1) * g
            step = rate * m / total / root
        elif averages_rates:  # the authors' code, and timm
            m = b1 * m + (1 - b1) * rate * g / root
            average_rate = b1 * average_rate + (1 - b1) * rate
            step = m * rate / average_rate
        else:
            m = b1 * m + (1 - b1) * g / root
            step = rate * m / total
        path.append(-step)
    return np.cumsum(path, axis=0)


OTHERS = {
    "b1": {"b1": 0.899},
    "b2": {"b2": 0.99},
    "inside": {"eps_in_sqrt": True},
    "squares not corrected": {"corrects_squares": False},
    "mean not corrected": {"corrects_mean": False},
    "Adam": {"averages_first": True},
    "timm": {"averages_rates": True},
}


def rates(count):
    return jnp.asarray(RATES)[count]


def path_of(tx, gradients):
    updates = run(tx, gradients, how="scan").updates
    return np.cumsum(np.float64(updates), axis=0)


def test_laprop_is_the_algorithm_of_the_paper():
    eps = 1e-3
    gradients = np.delete(reference.gradient_stream(STEPS, eps**2, 5), 7, axis=1)
    ours = path_of(recipes.laprop(rates, eps=eps), gradients)
    expected = laprop(gradients, RATES, eps=eps)
    assert reference.relative_error(ours, expected) <= BOUND
    others = {**OTHERS, "eps": {"eps": 0.99 * eps}}
    for name, change in others.items():
        other = laprop(gradients, RATES, **{"eps": eps, **change})
        assert reference.relative_error(other, expected) >= 5 * BOUND, name


def test_defaults_of_laprop():
    """4e-4, 0.9, 0.999, and an epsilon that only gradients below 1e-13 show."""
    scales = np.array([1.0, 1e-12, 1e-15])
    gradients = np.float32(np.random.default_rng(0).normal(size=(STEPS, 3)) * scales)
    ours = path_of(recipes.laprop(), gradients)
    expected = laprop(gradients, np.full(STEPS, 4e-4))
    assert reference.relative_error(ours, expected) <= BOUND
    for change in ({"eps": 1.1e-15}, {"b1": 0.899}, {"b2": 0.998}):
        other = laprop(gradients, np.full(STEPS, 4e-4), **change)
        assert reference.relative_error(other, expected) >= 5 * BOUND, change


def test_numbers_of_laprop_may_be_traced():
    """Also a b1 of 0, which is RMSProp with bias correction."""
    g = jnp.array([0.5, -2.0])

    @jax.jit
    @jax.vmap
    def second_update(b1):
        tx = recipes.laprop(0.1, b1, b2=0.5, eps=0.1)
        _, state = tx.update(g, tx.init(g))
        return tx.update(2 * g, state)[0]

    updates = second_update(jnp.array([0.0, 0.9]))
    u = [g / (abs(g) + 0.1), 2 * g / (jnp.sqrt((4 * g**2 + 0.5 * g**2) / 1.5) + 0.1)]
    expected = [-0.1 * u[1], -0.1 * (0.9 * u[0] + u[1]) / 1.9]
    np.testing.assert_allclose(updates, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["b1", "b2"])
def test_an_average_must_forget(name):
    with pytest.raises(ValueError, match=rf"{name} must be .*\[0, 1\), got 1"):
        recipes.laprop(**{name: 1.0})


def clip_to_weights(gradients, params, ratio=0.3, floor=1e-3):
    """``clip_by_agc`` of embodied/jax/opt.py: by whole tensors."""
    upper = ratio * max(floor, np.linalg.norm(params))
    return gradients / max(1.0, np.linalg.norm(gradients) / upper)


def clip_rows(gradients, params):
    """The rule of ``optax.adaptive_grad_clip``: by rows of the transposed matrix."""
    return np.stack(
        [clip_to_weights(*pair) for pair in zip(gradients, params, strict=True)]
    )


# A matrix with gradients of about the bound. Zeros, where the floor of 0.001 counts. An
# array whose gradients are as small as float32's squares allow, where epsilon counts.
START = {
    "kernel": np.float32(np.random.default_rng(1).normal(size=(3, 4))),
    "bias": np.zeros(4, np.float32),
    "small": np.full(4, 2.0, np.float32),
}
SCALES = {"kernel": 0.3, "bias": 1e-4, "small": 1e-16}


def dreamer_gradients():
    rng = np.random.default_rng(2)
    return {
        key: np.float32(scale * rng.normal(size=(STEPS, *START[key].shape)))
        for key, scale in SCALES.items()
    }


def dreamer(gradients, key, clip=clip_to_weights, warmup=40, b2=0.999, eps=1e-20):
    """The parameters less their start, when the parameters stay where they are.

    The rule of clipping reads the parameters, which move by less than 1e-3 of their
    norm, and of the floor, in this run: the recipe is run with the same start, too.
    """
    clipped = np.stack([clip(np.float64(g), START[key]) for g in gradients[key]])
    rates = 4e-5 * np.minimum(np.arange(STEPS) / warmup, 1)
    return laprop(clipped, rates, b2=b2, eps=eps)


def test_dreamer_is_the_optimizer_of_its_code():
    gradients = dreamer_gradients()
    tx = recipes.dreamer_v3(warmup_steps=40)

    @jax.jit
    def updates_of(gradients):
        def step(state, g):
            updates, state = tx.update(g, state, START)
            return state, updates

        return jax.lax.scan(step, tx.init(START), gradients)[1]

    updates = updates_of(gradients)

    def error(key, **change):
        path = np.cumsum(np.float64(updates[key]), axis=0)
        return reference.relative_error(path, dreamer(gradients, key, **change))

    assert max(map(error, START)) <= BOUND

    def with_floor(floor):
        return lambda g, p: clip_to_weights(g, p, floor=floor)

    for key, change in [
        ("kernel", {"clip": lambda g, p: g}),
        ("kernel", {"clip": lambda g, p: clip_to_weights(g, p, 0.31)}),
        ("kernel", {"clip": clip_rows}),
        ("bias", {"clip": with_floor(0.0011)}),
        ("small", {"eps": 3e-20}),
        *[(key, {"b2": 0.99}) for key in START],
        *[(key, {"warmup": 41}) for key in START],
    ]:
        assert error(key, **change) >= 5 * BOUND, (key, change)


def test_dreamer_clips_by_the_parameters_of_the_moment():
    """Twice as large weights allow twice as large gradients."""
    tx = recipes.dreamer_v3(learning_rate=1.0, warmup_steps=1)

    @jax.jit
    def second_update(g, p):
        _, state = tx.update(g, tx.init(p), p)
        return tx.update(g, state, 2 * p)[0]

    ours = second_update(jnp.array([3.0, 4.0]), jnp.array([1.0, 0.0]))
    clipped = np.array([[0.18, 0.24], [0.36, 0.48]])
    expected = np.diff(laprop(clipped, np.ones(2), eps=1e-20), axis=0)[0]
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_dreamer_needs_parameters_and_leaves_integers_alone():
    params = {"w": jnp.ones(2), "step": jnp.array(3), "seen": jnp.array(True)}
    gradients = {"w": jnp.ones(2), "step": None, "seen": None}
    tx = recipes.dreamer_v3(warmup_steps=1)
    state = tx.init(params)
    updates = jax.eval_shape(tx.update, gradients, state, params)[0]
    assert updates["step"] is updates["seen"] is None
    assert updates["w"].shape == (2,)
    with pytest.raises(ValueError, match="update needs the parameters, to clip"):
        tx.update(gradients, state)
    with pytest.raises(ValueError, match="warmup_steps must be at least 1"):
        recipes.dreamer_v3(warmup_steps=0)


def test_dreamer_is_differentiable_at_zero_weights():
    """The norm of zero weights has an infinite derivative, the bound has none."""

    def first_step(scale):
        tx = recipes.dreamer_v3(0.1)
        p = scale * jnp.zeros(2)
        return tx.update(jnp.ones(2), tx.init(p), p)[0].sum()

    assert jnp.isfinite(jax.jit(jax.grad(first_step))(1.0))
