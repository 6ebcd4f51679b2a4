# SPDX-License-Identifier: Apache-2.0
"""Gradients of NaN, infinity, 1e38, -0 and subnormal numbers, drawn by hypothesis.

Whatever the gradient of one element is, other elements keep their bits, and
`optax.apply_if_finite` keeps the bits of the whole state. Finite gradients give no NaN.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st

from optax_rms import (
    SE5M2,
    SE8M7,
    UE6M2,
    UE8M8,
    compress_state,
    dialects,
    rmsprop,
    split_master_weights,
)

STEPS = 4
SHAPES = {"b": (3,), "w": (2, 2)}
DTYPES = ("float16", "bfloat16", "float32", "float64")
FORMATS = {
    1: {"nu": UE6M2, "variance": UE6M2, "mu": SE5M2, "trace": SE5M2},
    2: {"nu": UE8M8, "variance": UE8M8, "mu": SE8M7, "trace": SE8M7},
}


class Variant(NamedTuple):
    """An optimizer of a decay and an epsilon, and the fields of its state."""

    build: Callable[..., optax.GradientTransformation]
    fields: tuple[str, ...] = ("nu",)


def _ours(**options: Any) -> Callable[..., optax.GradientTransformation]:
    return lambda decay, eps: rmsprop(0.1, decay, eps, **options)


def _torch(decay: Any, eps: Any) -> optax.GradientTransformation:
    return dialects.torch.rmsprop(0.1, decay, eps, momentum=0.9, centered=True)


def _keras(decay: Any, eps: Any) -> optax.GradientTransformation:
    return dialects.keras.rmsprop(0.1, decay, 0.9, eps, centered=True)


def _tensorflow(decay: Any, eps: Any) -> optax.GradientTransformation:
    return dialects.tensorflow.rmsprop(0.1, decay, 0.9, eps, centered=True)


CENTERED = ("mu", "variance")
VARIANTS = {
    "plain": Variant(_ours()),
    "eps_outside": Variant(_ours(eps_in_sqrt=False)),
    "bias_correction": Variant(_ours(bias_correction=True)),
    "nesterov": Variant(_ours(momentum=0.9, nesterov=True), ("nu", "trace")),
    "lr_outside_momentum": Variant(
        _ours(momentum=0.9, lr_in_momentum=False), ("nu", "trace")
    ),
    "centered": Variant(_ours(centered=True), CENTERED),
    "centered_bias_correction": Variant(
        _ours(centered=True, bias_correction=True), CENTERED
    ),
    "torch": Variant(_torch, (*CENTERED, "trace")),
    "keras": Variant(_keras, (*CENTERED, "trace")),
    "tensorflow": Variant(_tensorflow, (*CENTERED, "trace")),
}


class Case(NamedTuple):
    """A drawn case.

    Attributes:
      variant: a key of `VARIANTS`.
      num_bytes: per stored moment, 4 for the accumulators of the optimizer itself.
      split: whether bfloat16 or float16 weights are split.
      dtype: of weights and gradients.
      decay: from 0 to 0.9999.
      eps: from 0 to 1.
      seed: of the ordinary gradients.
      scale: of the ordinary gradients.
      extremes: step, leaf, element and value of each other gradient.
    """

    variant: str
    num_bytes: int
    split: bool
    dtype: str
    decay: float
    eps: float
    seed: int
    scale: float
    extremes: list[tuple[int, str, int, float]]


def values_of(dtype: str) -> list[float]:
    """Half the largest number at most: the difference of two of them is finite."""
    info = jnp.finfo(dtype)
    half, subnormal = float(info.max) / 2, float(info.smallest_subnormal)
    values = [np.nan, np.inf, -np.inf, half, -half, subnormal, -0.0, 1e-30]
    return [*values, *(v for v in (1e20, 1e38, -1e38) if v < half)]


@st.composite
def cases(draw: Any, variants: Sequence[str], dtypes: Sequence[str]) -> Case:
    dtype = draw(st.sampled_from(dtypes))
    half = dtype in ("float16", "bfloat16")
    element = st.tuples(
        st.integers(0, STEPS - 1),
        st.sampled_from(sorted(SHAPES)),
        st.integers(0, 2),
        st.sampled_from(values_of(dtype)),
    )
    return Case(
        variant=draw(st.sampled_from(variants)),
        # Arrays of 64 bits are not compressed.
        num_bytes=4 if dtype == "float64" else draw(st.sampled_from([1, 2, 4])),
        split=half and draw(st.booleans()),
        dtype=dtype,
        decay=draw(st.sampled_from([0, 0.5, 0.9, 0.9999]) | st.floats(0, 0.9999)),
        eps=draw(st.sampled_from([0, 1e-45, 1e-30, 1e-8, 1]) | st.floats(0, 1)),
        seed=draw(st.integers(0, 2**16)),
        scale=10.0 ** draw(st.integers(-4, 2)),
        extremes=draw(st.lists(element, min_size=1, max_size=3)),
    )


def build(case: Case, decay: Any, eps: Any) -> optax.GradientTransformation:
    variant = VARIANTS[case.variant]
    tx = variant.build(decay, eps)
    if case.num_bytes < 4:
        formats = FORMATS[case.num_bytes]
        tx = compress_state(tx, **{field: formats[field] for field in variant.fields})
    return split_master_weights(tx) if case.split else tx


class Program(NamedTuple):
    """Of an optimizer with traced numbers, the first state and the compiled update."""

    params: Any
    state: Any
    update: Any


@functools.cache
def _program(key: Case, guarded: bool) -> Program:
    def tx(decay: Any, eps: Any) -> optax.GradientTransformation:
        tx = build(key, decay, eps)
        return optax.apply_if_finite(tx, STEPS) if guarded else tx

    def update(decay: Any, eps: Any, gradients: Any, state: Any, params: Any) -> Any:
        return tx(decay, eps).update(gradients, state, params)

    params = {name: jnp.ones(s, key.dtype) for name, s in SHAPES.items()}
    return Program(params, tx(0.5, 1.0).init(params), jax.jit(update))


# Apart, or XLA would round the product with the learning rate and the sum as one in
# some of the programs.
_apply = jax.jit(optax.apply_updates)


def run(case: Case, gradients: Sequence[Any], guarded: bool = False) -> list[Any]:
    """The updates, states and weights after each step, and first those before."""
    key = case._replace(decay=0, eps=0, seed=0, scale=0, extremes=())
    program = _program(key, guarded)
    numbers = np.float32(case.decay), np.float32(case.eps)
    steps: list[Any] = [(None, program.state, program.params)]
    for g in gradients:
        _, state, params = steps[-1]
        updates, state = program.update(*numbers, g, state, params)
        steps.append((updates, state, _apply(params, updates)))
    return jax.tree.map(np.asarray, steps)


def ordinary_gradients(case: Case) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(case.seed)
    return [
        {
            name: (case.scale * rng.normal(size=shape)).astype(jnp.dtype(case.dtype))
            for name, shape in SHAPES.items()
        }
        for _ in range(STEPS)
    ]


def check(case: Case, counts: collections.Counter) -> None:
    """Raises an ``AssertionError`` if a promise is broken; counts the comparisons."""
    ordinary = ordinary_gradients(case)
    gradients = jax.tree.map(np.copy, ordinary)
    touched = {name: np.zeros(shape, bool) for name, shape in SHAPES.items()}
    for step, name, element, value in case.extremes:
        gradients[step][name].flat[element] = value
        touched[name].flat[element] = True
    steps = run(case, gradients)
    counts["cases"] += 1

    others = jax.tree.map(lambda x: _untouched(x, touched), steps)
    expected = run(case, ordinary)
    expected = jax.tree.map(lambda x: _untouched(x, touched), expected)
    assert _bits(others) == _bits(expected), "another element changed"
    counts["bits_compared"] += 8 * len(_bits(others))

    finite = [_all_finite(g) for g in gradients]
    if all(finite):
        counts["finite_cases"] += 1
        for before, after in itertools.pairwise(steps):
            # An infinite weight minus an infinite step is NaN outside of the optimizer.
            if _all_finite(before[2]):
                assert not _any_nan(after[:2]), f"finite gradients gave {after[:2]}"
    else:
        counts["skipped_steps"] += finite.count(False)
        guarded = run(case, gradients, guarded=True)
        kept = run(case, [*itertools.compress(gradients, finite)])
        assert _bits(guarded[-1][1].inner_state) == _bits(kept[-1][1]), "state changed"
        assert _bits(guarded[-1][2]) == _bits(kept[-1][2]), "weights changed"


def _untouched(x: np.ndarray, touched: dict[str, np.ndarray]) -> np.ndarray:
    """The elements of an array like a weight that had ordinary gradients only."""
    masks = {mask.shape: ~mask for mask in touched.values()}
    return x[masks[x.shape]] if x.shape in masks else x


def _bits(tree: Any) -> bytes:
    return b"".join(leaf.tobytes() for leaf in jax.tree.leaves(tree))


def _floats(tree: Any) -> list[np.ndarray]:
    leaves = jax.tree.leaves(tree)
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]


def _all_finite(tree: Any) -> bool:
    return all(np.isfinite(x.astype(np.float64)).all() for x in _floats(tree))


def _any_nan(tree: Any) -> bool:
    return any(np.isnan(x.astype(np.float64)).any() for x in _floats(tree))


def measure(
    count: int, variants: Sequence[str] = tuple(VARIANTS), dtypes: Any = DTYPES
) -> dict[str, int]:
    """Draws ``count`` cases. The dtype float64 needs ``jax_enable_x64``."""
    counts: collections.Counter = collections.Counter()

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases(variants, dtypes))
    def draw(case: Case) -> None:
        check(case, counts)

    draw()
    return dict(counts)
