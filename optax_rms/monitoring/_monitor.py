# SPDX-License-Identifier: Apache-2.0
"""The wrapper that keeps a report on the last step in the optimizer's state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from optax_rms import _checks as checks
from optax_rms._types import PyTree
from optax_rms.monitoring._step_report import StepReport, report_of


class MonitorState(NamedTuple):
    """State of `monitor`.

    Attributes:
      num_steps: number of updates so far, int32 scalar.
      report: the report on the last step that there is one of.
      inner_state: state of the wrapped transformation.
    """

    num_steps: jax.Array
    report: StepReport
    inner_state: Any


def monitor(
    inner: optax.GradientTransformation,
    every: int = 1,
    *,
    eps: ArrayLike | None = None,
    eps_in_sqrt: bool = True,
    decay: ArrayLike | None = None,
    layer_axis: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """Keep a report on the last step in the state, for training loops of others.

    Flax' ``TrainState`` and ``nnx.Optimizer`` and many loops do not show gradients and
    updates side by side. Around the optimizer, `monitor` sees both, and stores the
    `StepReport` of every ``every``-th step, beginning with the first, which
    `read_report` takes out of the state between two steps. Updates are those of
    ``inner``, but for what the compiler rounds otherwise in another program. Structure,
    shapes and dtypes of the state are fixed by ``init``, as ``jax.lax.scan`` demands.

    A report reads gradients, parameters and moments once more, before the step
    overwrites them. Nothing is copied for that, and steps without a report move no more
    bytes than those of ``inner``. Compiled for the CPU, an update of float32 RMSProp
    alone moves 28 bytes per element, and a report reads 12 of them again, the least
    that a pass of its own can read: ``every=1`` adds 43 %, and ``every=50`` less than
    1 %. For a whole training step the share is smaller, for example 3 % with
    ``every=1`` for a small transformer. XLA's cost analysis says 71 % for the update
    alone: the percentiles read a sample of two arrays, and XLA counts all elements. The
    report computes ``inner.update`` again, twice, fused into its sums, so that
    ``inner`` takes three times as long to compile. Under ``jax.vmap``, every step
    computes a report.

    Args:
      inner: any transformation whose updates are added to the parameters. It should be
        the whole optimizer, learning rate included.
      every: number of steps from one report to the next, an int of at least 1.
      eps: as in `step_report`.
      eps_in_sqrt: as in `step_report`.
      decay: as in `step_report`.
      layer_axis: as in `step_report`.

    Returns:
      A gradient transformation with a `MonitorState`. Its ``update`` needs ``params``,
      and hands further keyword arguments to ``inner``. A gradient of ``None`` counts as
      zero in the report.

    Raises:
      ValueError: ``every`` is out of range; in ``update``, ``params`` are missing; and
        as in `step_report`.
      TypeError: ``every`` is not an int; in ``update``, the state is of another
        transformation.

    Example:
      In bfloat16 there is nothing between 1 and 1 - 2^-8, and a learning rate of 1e-3
      moves no weight of 1:

      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_rms
      >>> tx = optax_rms.monitor(optax_rms.rmsprop(1e-3, decay=0.0), every=10)
      >>> params = {"scale": jnp.ones(8, jnp.bfloat16), "bias": jnp.zeros(8)}
      >>> state = tx.init(params)
      >>> gradients = {"scale": jnp.ones(8, jnp.bfloat16), "bias": jnp.ones(8)}
      >>> updates, state = tx.update(gradients, state, params)
      >>> for name, figures in optax_rms.read_report(state).leaves.items():
      ...     print(name, figures.lost_to_rounding)
      bias 0.0
      scale 1.0
    """
    every = checks.check_steps("every", every)
    options: dict[str, Any] = {
        "eps": eps,
        "eps_in_sqrt": eps_in_sqrt,
        "decay": decay,
        "layer_axis": layer_axis,
    }
    inner = optax.with_extra_args_support(inner)

    def init(params) -> Any:
        inner_state = inner.init(params)
        shapes = jax.eval_shape(
            lambda p, s: report_of(p, p, p, s, (p, p), **options),
            checks.check_parameters(params),
            inner_state,
        )
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return MonitorState(jnp.zeros([], jnp.int32), empty, inner_state)

    def update(updates, state, params=None, **extra_args) -> tuple[Any, Any]:
        checks.check_state_class("monitor", state, MonitorState)
        if params is None:
            raise ValueError(
                "monitor needs the parameters, on which it reports: call "
                "update(gradients, state, params)."
            )

        def new_report() -> StepReport:
            g, s, p = updates, state.inner_state, params
            changes, new_state = inner.update(g, s, p, **extra_args)
            # The sample that the rates are of has an update of its own. If it shared
            # that of the sums, XLA would write the update to memory for both.
            again = jax.lax.optimization_barrier(g)
            changes_again, _ = inner.update(again, s, p, **extra_args)
            g, changes, again, changes_again = (
                _zeros_for_none(tree, p) for tree in (g, changes, again, changes_again)
            )
            rated = again, changes_again
            return report_of(
                g, changes, checks.check_parameters(p), new_state, rated, **options
            )

        if every == 1:
            report = new_report()
        else:
            is_due = state.num_steps % every == 0
            report = jax.lax.cond(is_due, new_report, lambda: state.report)
        updates = _after(report, updates)
        updates, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        num_steps: Any = optax.safe_increment(state.num_steps)
        return updates, MonitorState(num_steps, report, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def read_report(state: Any) -> StepReport:
    """The report that `monitor` keeps in an optimizer state.

    Args:
      state: a `MonitorState`, or any state that contains one, for example
        ``train_state.opt_state`` of Flax' ``TrainState`` or ``optimizer.opt_state`` of
        ``nnx.Optimizer``.

    Returns:
      The `StepReport` on the last step that `monitor` reported on.

    Raises:
      ValueError: ``state`` contains no `MonitorState`, or several, or no step has been
        taken.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_rms
      >>> tx = optax.chain(optax.clip(1.0), optax_rms.monitor(optax.sgd(0.1)))
      >>> params = {"w": jnp.full(3, 2.0)}
      >>> updates, state = tx.update({"w": jnp.full(3, 9.0)}, tx.init(params), params)
      >>> print(optax_rms.read_report(state).table())
      leaf  elements  gradient   update  parameter  upd/par     rate   p99/p1  lost ...
    """
    states = [s for s in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(s)]
    if len(states) != 1:
        raise ValueError(
            "state must contain one MonitorState, which monitor makes; there are "
            f"{len(states)} in this {type(state).__name__}. Where there are several, "
            "for example in an optax.partition, give the part with one of them."
        )
    # `flax.nnx.Optimizer` keeps each array in a variable.
    (num_steps,) = jax.tree.leaves(states[0].num_steps)
    if not isinstance(num_steps, Tracer) and num_steps == 0:
        raise ValueError("there is no report before the first step; call update first.")
    return states[0].report


def _zeros_for_none(tree: PyTree, params: PyTree) -> PyTree:
    return jax.tree.map(
        lambda p, x: jnp.zeros_like(p) if x is None and p is not None else x,
        checks.check_parameters(params),
        tree,
        is_leaf=lambda p: p is None,
    )


def _after(report: StepReport, gradients: PyTree) -> PyTree:
    """The gradients, computed after the report.

    Without this order, XLA copies parameters and moments, which the step overwrites
    while the report may still have to read them; `jax.lax.optimization_barrier` does
    not keep it from that. The condition never holds, which XLA cannot know.
    """
    never = jnp.any(report.gradient_rms < -1) | jnp.any(report.rates < -1)
    return jax.tree.map(lambda g: jnp.where(never, jnp.zeros_like(g), g), gradients)


def _is_state(node: Any) -> bool:
    return isinstance(node, MonitorState)
