# SPDX-License-Identifier: Apache-2.0
"""The report on one step of any Optax optimizer, leaf by leaf."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_leaves_with_path
from jax.typing import ArrayLike

from optax_rms import _checks as checks
from optax_rms._leaf_names import dotted_name, leaf_name
from optax_rms._types import PyTree
from optax_rms.monitoring._effective_rates import effective_rates
from optax_rms.monitoring._figures import Figures, combine
from optax_rms.monitoring._leaf_figures import elements_per_layer, leaf_figures
from optax_rms.monitoring._table import format_table
from optax_rms.monitoring._told_by_state import (
    bytes_by_path,
    moments_by_path,
    num_bytes,
    saturated_by_path,
)


class StepReport(NamedTuple):
    """What one step did, as arrays with a row for each leaf or layer of a leaf.

    A tree of arrays, which `jax.jit`, `jax.lax.scan` and checkpoints carry like any
    other. `leaves`, `whole`, `table` and `to_dict` read it, outside of `jax.jit`.

    Attributes:
      elements: number of elements, in a tree like the gradients: a uint32 scalar per
        leaf, or an array ``[layers]``. The rows of the other arrays are in its order.
      gradient_rms: root mean square of the gradient, float32 ``[rows]``.
      update_rms: that of the update.
      parameter_rms: that of the parameter before the step.
      rates: effective learning rates ``|update| / |gradient|``, the 1st, 50th and 99th
        percentile, ``[rows + 1, 3]``; the last row is that of all leaves together. NaN
        where no gradient is finite and other than 0.
      second_moment: root of the mean of the mean squares, ``[rows]``.
      deviation: root mean square of the standard deviations of a centered state.
      mean: root mean square of the mean gradients of a centered state.
      live: number of elements whose mean square the state tells, uint32 ``[rows]``;
        elements that have not had a gradient yet do not count.
      ruled_by_eps: number of those whose mean square is below ``eps``, or its root;
        ``None`` without ``eps``.
      at_cap: number of those whose mean square is for 3/4 or more this gradient's;
        ``None`` without ``decay``.
      lost_to_rounding: number of updates other than 0 that do not move the parameter.
      zero_gradients: number of gradients of 0.
      zero_updates: number of updates of 0.
      nonfinite: number of elements whose gradient, update or parameter is not finite.
      codes: number of codes in a compressed state.
      saturated: number of those at the largest value of their format.
      state_bytes: bytes of the state per row, float32; ``None`` without a state.
      all_state_bytes: bytes of the whole state, with counters, a float32 scalar.
    """

    elements: PyTree
    gradient_rms: jax.Array
    update_rms: jax.Array
    parameter_rms: jax.Array
    rates: jax.Array
    second_moment: jax.Array
    deviation: jax.Array
    mean: jax.Array
    live: jax.Array
    ruled_by_eps: jax.Array | None
    at_cap: jax.Array | None
    lost_to_rounding: jax.Array
    zero_gradients: jax.Array
    zero_updates: jax.Array
    nonfinite: jax.Array
    codes: jax.Array
    saturated: jax.Array
    state_bytes: jax.Array | None
    all_state_bytes: jax.Array | None

    @property
    def leaves(self) -> dict[str, Figures]:
        """The figures of each leaf, or of each of its layers, by its name."""
        rows, rates, state_bytes = self._rows()
        return {
            name: combine(
                {field: array[i : i + 1] for field, array in rows.items()},
                rates[i],
                None if state_bytes is None else state_bytes[i],
            )
            for i, name in enumerate(_row_names(self.elements))
        }

    @property
    def whole(self) -> Figures:
        """The figures of all leaves together."""
        rows, rates, _ = self._rows()
        total = jax.tree.leaves(self.all_state_bytes)
        return combine(rows, rates[-1], float(total[0]) if total else None)

    def table(self) -> str:
        """The figures as an aligned table, one line per leaf, the worst leaf first.

        The end of a line says in words what is out of the usual range; the ranges and
        their sources are in the guide "Is it training?".
        """
        return format_table(self.leaves, self.whole)

    def to_dict(self, prefix: str = "") -> dict[str, float]:
        """All figures that are told, as Python floats, for loggers.

        Args:
          prefix: put before each name, for example ``"optimizer/"``.

        Returns:
          A figure of a leaf is at ``f"{prefix}{leaf}/{figure}"``, that of all leaves
          together at ``f"{prefix}{figure}"``.
        """
        found = {f"{prefix}{k}": v for k, v in self.whole._asdict().items()}
        for name, figures in self.leaves.items():
            found |= {f"{prefix}{name}/{k}": v for k, v in figures._asdict().items()}
        return {name: float(v) for name, v in found.items() if v is not None}

    def _rows(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray | None]:
        """The columns that are combined, the rates, and the bytes of the state."""
        columns = {
            # `flax.nnx.Optimizer` keeps each array in a variable.
            name: np.asarray(*jax.tree.leaves(column))
            for name, column in self._asdict().items()
            if column is not None and name not in ("elements", "all_state_bytes")
        }
        sizes = [np.ravel(n) for n in jax.tree.leaves(self.elements)]
        columns["elements"] = np.concatenate([np.zeros(0, np.uint32), *sizes])
        rates, state_bytes = columns.pop("rates"), columns.pop("state_bytes", None)
        return columns, rates, state_bytes


def step_report(
    gradients: PyTree,
    updates: PyTree,
    params: PyTree,
    state: Any = None,
    *,
    eps: ArrayLike | None = None,
    eps_in_sqrt: bool = True,
    decay: ArrayLike | None = None,
    layer_axis: PyTree = None,
) -> StepReport:
    r"""Report what one step of any Optax optimizer did, leaf by leaf.

    Which layers train, which of them epsilon rules, so that RMSProp is gradient descent
    there, and which lose their updates to rounding. With gradient :math:`g`, update
    :math:`u`, parameter :math:`\theta` and the mean square :math:`\nu` of the state,
    each with one element :math:`i` of :math:`n`, the figures are

    .. math::
      \text{rms}(x) &= \sqrt{\tfrac{1}{n} \sum_i |x_i|^2}
        \quad\text{of } g, u \text{ and } \theta \\
      \text{update_to_parameter} &= \text{rms}(u) / \text{rms}(\theta) \\
      \text{rate} &= \text{percentiles of } |u_i| / |g_i|,\; g_i \ne 0 \\
      \text{ruled_by_eps} &= \text{share of } \nu_i < \text{eps}
        \quad\text{or, if not eps_in_sqrt,}\quad \sqrt{\nu_i} < \text{eps} \\
      \text{lost_to_rounding} &= \text{share of }
        \text{round}(\theta_i + u_i) = \theta_i \text{ where } u_i \ne 0 \\
      \text{at_cap} &= \text{share of }
        (1 - \text{decay}) |g_i|^2 \ge \tfrac{3}{4} \nu_i \\
      \text{gradient_to_mean_square} &=
        \sum_i |g_i|^2 / \sum_i \nu_i

    and what `Figures` lists besides. Where the optimizer corrects the bias of
    :math:`\nu`, the corrected one is meant, and that needs ``decay``. With a centered
    state, the variance takes the place of :math:`\nu` in ``ruled_by_eps`` and
    ``at_cap``, and there is a noise to signal.

    The state of RMSProp (Optax's and this library's, in every dialect, centered or not)
    and of Adam tells a mean square, also inside of a chain, a partition, a
    `compress_state` or a `split_master_weights`. Of other states, for example that of
    ``optax.lion``, these figures are ``None``. ``optax.adamax`` keeps a maximum in the
    state of Adam: ignore its figures of the mean square.

    The function works under ``jax.jit``, ``jax.lax.scan``, ``jax.vmap`` and sharding,
    on every backend, and calls nothing on the host. Counts are integers, and so the
    same under any sharding; root mean squares may differ there by a rounding error of
    float32, 1e-7. Squares that float32 cannot hold count as 0 or infinity: magnitudes
    below 1e-22 and above 1e19; and subnormal numbers are 0 where the processor takes
    them for 0. Each leaf is read once. Of a leaf, or a layer, of more
    than 4,096 elements, the percentiles are those of at most 4,096 elements at equal
    distances, everything else is of all elements. In memory, the report takes about 80
    bytes per row.

    Args:
      gradients: the gradients that ``update`` was given; ``None`` leaves are left out.
        If the optimizer clips gradients before it averages them,
        ``gradient_to_mean_square`` compares clipped with unclipped gradients: report
        on the part behind the clipping.
      updates: the updates that it returned, in the same tree.
      params: the parameters before the step, in the same tree.
      state: the state that ``update`` returned; ``None`` if it is not known.
      eps: the optimizer's, positive; ``None`` if there is none.
      eps_in_sqrt: whether ``eps`` sits inside the root; for example ``False`` for Adam.
      decay: weight of the past in the mean square, in [0, 1], ``b2`` of Adam.
      layer_axis: the axis along which a leaf stacks layers, for example ``0`` for
        layers that ``jax.lax.scan`` runs over; each layer then has a row of its own.
        Either for all leaves, or a tree prefix of the gradients with axes and ``None``,
        for example ``{"blocks": 0, "embed": None}``.

    Returns:
      A `StepReport`.

    Raises:
      ValueError: a number is out of range; the trees or shapes differ; a leaf has not
        that axis.
      TypeError: a gradient is neither floating-point nor complex; ``layer_axis``
        contains something else than axes.

    Example:
      IMPALA's epsilon of 0.1 is for a loss that is a sum. The gradients of a mean are
      so small next to it that epsilon rules all of the first layer:

      >>> import jax.numpy as jnp
      >>> import optax_rms
      >>> params = {"first": jnp.ones(4), "last": jnp.ones(4)}
      >>> gradients = {"first": jnp.full(4, 1e-3), "last": jnp.full(4, 10.0)}
      >>> tx = optax_rms.rmsprop(1e-3, decay=0.9, eps=0.1)
      >>> updates, state = tx.update(gradients, tx.init(params), params)
      >>> report = optax_rms.step_report(
      ...     gradients, updates, params, state, eps=0.1, decay=0.9
      ... )
      >>> for name, figures in report.leaves.items():
      ...     print(name, figures.ruled_by_eps, figures.at_cap)
      first 1.0 1.0
      last 0.0 1.0

      Two lines hand all figures to TensorBoard, and one to Weights & Biases:

      >>> for name, value in report.to_dict("optimizer/").items():
      ...     pass  # writer.add_scalar(name, value, step)
      >>> # wandb.log(report.to_dict("optimizer/"), step=step)
      >>> print(report.to_dict("optimizer/")["optimizer/first/ruled_by_eps"])
      1.0

    References:
      Karpathy, 2015, CS231n: Convolutional Neural Networks for Visual Recognition,
      Learning (ratio of updates and weights), https://cs231n.github.io/neural-networks-3/
    """
    return report_of(
        *(gradients, updates, params, state, (gradients, updates)),
        eps=eps,
        eps_in_sqrt=eps_in_sqrt,
        decay=decay,
        layer_axis=layer_axis,
    )


def report_of(
    gradients: PyTree,
    updates: PyTree,
    params: PyTree,
    state: Any,
    rated: tuple[PyTree, PyTree],
    *,
    eps: ArrayLike | None,
    eps_in_sqrt: bool,
    decay: ArrayLike | None,
    layer_axis: PyTree,
) -> StepReport:
    """`step_report`, with other copies of gradients and updates for the rates."""
    # A derivative of the training has no part in the report.
    gradients, updates, params, state, rated = jax.lax.stop_gradient(
        (gradients, updates, params, state, rated)
    )
    checks.check_inexact_leaves("gradients", gradients)
    eps_in_sqrt = checks.check_flag("eps_in_sqrt", eps_in_sqrt)
    number = jnp.result_type(float)
    if eps is not None:
        eps = checks.check_number("eps", eps)
        eps = jax.lax.stop_gradient(jnp.asarray(eps, number))
    if decay is not None:
        decay = checks.check_number("decay", decay, 0, 1)
        decay = jax.lax.stop_gradient(jnp.asarray(decay, number))
    rows = tree_leaves_with_path(gradients)
    paths = [path for path, _ in rows]
    trees = [
        jax.tree.leaves(gradients),
        *_aligned(gradients, updates=updates, params=params),
    ]
    leaves = [tuple(map(jnp.asarray, xs)) for xs in zip(*trees, strict=True)]
    _check_shapes(paths, leaves)
    axes = _layer_axes(layer_axis, gradients, paths, [g.shape for g, _, _ in leaves])
    moments = moments_by_path(state, decay)
    saturated = saturated_by_path(state, paths)
    bytes_of = bytes_by_path(state, paths)
    figures, elements, state_bytes, codes = [], [], [], []
    for path, (g, u, p), axis in zip(paths, leaves, axes, strict=True):
        told = moments.get(path)
        if told is not None and any(x.shape != p.shape for x in told.fields.values()):
            told = None
        masks = [x for x in saturated[path] if x.shape == p.shape]
        figures.append(
            leaf_figures(
                *(g, u, p, told, masks, eps, decay),
                eps_in_sqrt=eps_in_sqrt,
                layer_axis=axis,
            )
        )
        layers = () if axis is None else (p.shape[axis],)
        count = elements_per_layer(p.shape, axis)
        elements.append(jnp.full(layers, count, jnp.uint32))
        codes.append(jnp.full(layers, count * len(masks), jnp.uint32))
        share = bytes_of[path] / max(1, math.prod(layers))
        state_bytes.append(jnp.full(layers, share, jnp.float32))

    def rows_of(name: str, dtype: Any) -> jax.Array:
        """A column of the report, 0 where a leaf does not have that figure."""
        column = [
            f.get(name, jnp.zeros(n.shape)).astype(dtype)
            for f, n in zip(figures, elements, strict=True)
        ]
        return _stack(column, dtype)

    has_state = state is not None
    return StepReport(
        elements=jax.tree.unflatten(jax.tree.structure(gradients), elements),
        rates=effective_rates(
            jax.tree.leaves(rated[0]), _aligned(rated[0], updates=rated[1])[0], axes
        ),
        ruled_by_eps=None if eps is None else rows_of("ruled_by_eps", jnp.uint32),
        at_cap=None if decay is None else rows_of("at_cap", jnp.uint32),
        codes=_stack(codes, jnp.uint32),
        state_bytes=_stack(state_bytes, jnp.float32) if has_state else None,
        all_state_bytes=jnp.float32(_total_bytes(state)) if has_state else None,
        **{name: rows_of(name, jnp.float32) for name in _AVERAGES},
        **{name: rows_of(name, jnp.uint32) for name in _COUNTS},
    )


_AVERAGES = (
    "gradient_rms",
    "update_rms",
    "parameter_rms",
    "second_moment",
    "deviation",
    "mean",
)
_COUNTS = (
    "live",
    "lost_to_rounding",
    "zero_gradients",
    "zero_updates",
    "nonfinite",
    "saturated",
)


def _stack(column: list[jax.Array], dtype: Any) -> jax.Array:
    return jnp.concatenate([jnp.zeros(0, dtype), *map(jnp.ravel, column)])


def _total_bytes(state: Any) -> int:
    return sum(map(num_bytes, jax.tree.leaves(state)))


def _row_names(elements: PyTree) -> list[str]:
    """A name for each row: dots between keys, and the number of the layer in brackets.

    Keys may have dots themselves. If that makes two names equal, all are written as JAX
    writes paths.
    """
    leaves = tree_leaves_with_path(elements)
    names = [dotted_name(path) for path, _ in leaves]
    if len(set(names)) < len(names):
        names = [leaf_name(path) for path, _ in leaves]
    return [
        f"{name}[{layer}]" if np.ndim(n) else name
        for name, (_, n) in zip(names, leaves, strict=True)
        for layer in range(np.size(n))
    ]


def _aligned(gradients: PyTree, **trees: PyTree) -> list[list[Any]]:
    """The leaves of other trees that have a gradient."""
    leaves, treedef = jax.tree.flatten(gradients, is_leaf=lambda g: g is None)
    has_gradient = [g is not None for g in leaves]
    columns = []
    for name, tree in trees.items():
        try:
            column = treedef.flatten_up_to(tree)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{name} must be a tree like the gradients, "
                f"{jax.tree.structure(gradients)}, got {jax.tree.structure(tree)}."
            ) from error
        columns.append([x for x, has in zip(column, has_gradient, strict=True) if has])
    return columns


def _check_shapes(paths, leaves) -> None:
    """Raise a ``ValueError`` naming every leaf whose three shapes differ."""
    bad = [
        f"{leaf_name(path)}: gradient {g.shape}, update {u.shape}, parameter {p.shape}"
        for path, (g, u, p) in zip(paths, leaves, strict=True)
        if not g.shape == u.shape == p.shape
    ]
    if bad:
        raise ValueError(
            "gradients, updates and params must have the same shapes; "
            f"{'; '.join(bad)}."
        )


def _layer_axes(layer_axis, gradients, paths, shapes) -> list[int | None]:
    """The axis of the layers of each leaf, not negative."""
    axes: list[Any] = []

    def spread(axis, subtree):
        axes.extend([axis] * len(jax.tree.leaves(subtree)))

    try:
        jax.tree.map(spread, layer_axis, gradients, is_leaf=lambda axis: axis is None)
    except ValueError as error:
        raise ValueError(
            "layer_axis must be None, an axis, or a tree prefix of the gradients with "
            f"these, such as {{'blocks': 0, 'embed': None}}, got {layer_axis!r} for "
            f"gradients {jax.tree.structure(gradients)}."
        ) from error
    bad = []
    for i, (axis, shape) in enumerate(zip(axes, shapes, strict=True)):
        if axis is None:
            continue
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(
                f"layer_axis must contain axes of type int and None, got {axis!r}."
            )
        if -len(shape) <= axis < len(shape):
            axes[i] = axis % len(shape)
        else:
            bad.append(f"{leaf_name(paths[i])} has shape {shape}, axis {axis}")
    if bad:
        raise ValueError(
            f"layer_axis must be an axis of each leaf; {'; '.join(bad)}. Give a tree "
            "with None for leaves without layers."
        )
    return axes
