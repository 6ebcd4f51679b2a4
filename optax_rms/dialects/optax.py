# SPDX-License-Identifier: Apache-2.0
"""RMSProp of Optax, and import and export of states from and to Optax.

Without ``centered``, and with parameters of at least float32, no conversion is needed:
``optax.rmsprop`` has the same state as ``optax_rms.rmsprop``.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from optax_rms._leaf_names import dotted_name
from optax_rms._rmsprop import rmsprop as rmsprop
from optax_rms._scale_by_rms import ScaleByRmsWithCountState as _RmsWithCount
from optax_rms._scale_by_rms import ScaleByStddevState
from optax_rms._types import PyTree
from optax_rms.dialects._shared import reading, variances
from optax_rms.dialects._shared.inverse import exact_inverse
from optax_rms.dialects._shared.plain_state import check_plain_state
from optax_rms.dialects._shared.problems import Problems

# Optax exports only the two classes without a count.
_Rms: Any = optax.ScaleByRmsState
_Stddev: Any = optax.ScaleByRStdDevState
_StddevWithCount: Any = type(
    jax.eval_shape(optax.scale_by_stddev(bias_correction=True).init, ())
)

__all__ = ["export_state", "import_state", "rmsprop"]


def import_state(opt_state: PyTree, decay: float | None = None) -> PyTree:
    r"""Turn a state of ``optax.rmsprop`` into one of ``optax_rms.rmsprop``.

    States of ``optax.scale_by_rms`` and ``optax.scale_by_stddev`` are converted,
    wherever they are in ``opt_state``, for example in the state of ``optax.chain``,
    ``optax.MultiSteps`` or ``optax.inject_hyperparams``. All other states stay as they
    are. Centered, Optax keeps the mean square :math:`\nu` where this library keeps the
    variance, which rounding cannot make negative:

    .. math::
      \mu = \mu_{\text{Optax}} / w, \qquad
      \text{variance} = \nu_{\text{Optax}} - w \, |\mu|^2

    where :math:`w` is 1 or, with bias correction, :math:`1 - \text{decay}^t`. Averages
    in half precision become float32; the momentum keeps its dtype.

    Args:
      opt_state: the state that ``init`` or ``update`` of an Optax optimizer returned.
      decay: the decay of the optimizer, in [0, 1), for example 0.9; needed, and used,
        only with both ``centered`` and ``bias_correction``.

    Returns:
      The state for the same optimizer with ``optax_rms`` in place of ``optax``.

    Raises:
      ValueError: there is no RMSProp in the state, or an array is missing, of a wrong
        shape, not finite, or negative; everything found is in the message.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_rms import dialects
      >>> params = jnp.array([1.0, 2.0])
      >>> theirs = optax.rmsprop(0.1, centered=True)
      >>> ours = dialects.optax.rmsprop(0.1, centered=True)
      >>> _, state = theirs.update(jnp.array([3.0, 4.0]), theirs.init(params))
      >>> print(theirs.update(jnp.array([1.0, 1.0]), state)[0].round(5))
      [-0.11373 -0.08676]
      >>> state = dialects.optax.import_state(state)
      >>> print(ours.update(jnp.array([1.0, 1.0]), state)[0].round(5))
      [-0.11373 -0.08676]
    """
    _check(opt_state, decay, "imported", (_Stddev, _StddevWithCount))

    def convert(state):
        count = state.count if isinstance(state, _StddevWithCount) else None
        weight = _weight(count, decay)
        mu = _map(lambda m: _divide(m, weight), state.mu)
        variance = _map(lambda n, m: _variance(n, m, weight), state.nu, mu)
        return ScaleByStddevState(count, mu, variance)

    return _convert(opt_state, convert)


def export_state(opt_state: PyTree, decay: float | None = None) -> PyTree:
    """The inverse of `import_state`: a state for Optax.

    Args:
      opt_state: the state that ``init`` or ``update`` of ``optax_rms.rmsprop``
        returned, or a larger state with such a state in it.
      decay: as for `import_state`.

    Returns:
      The state for the same optimizer with ``optax`` in place of ``optax_rms``. The
      dtypes stay the same.

    Raises:
      ValueError: as for `import_state`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_rms import dialects
      >>> tx = dialects.optax.rmsprop(0.1, decay=0.5, centered=True)
      >>> _, state = tx.update(jnp.array([2.0]), tx.init(jnp.array([0.0])))
      >>> print(state[0].mu, state[0].variance)
      [1.] [1.]
      >>> state = dialects.optax.export_state(state)
      >>> print(state[0].mu, state[0].nu)
      [1.] [2.]
    """
    check_plain_state("optax.export_state", opt_state)
    _check(opt_state, decay, "exported", (ScaleByStddevState,))

    def convert(state):
        weight = _weight(state.count, decay)
        mu = _map(lambda m: _multiply(m, weight), state.mu)
        nu = _map(lambda s, m: _mean_square(s, m, weight), state.variance, state.mu)
        if state.count is None:
            return _Stddev(mu=mu, nu=nu)
        return _StddevWithCount(count=state.count, mu=mu, nu=nu)

    return _convert(opt_state, convert)


def _is_rmsprop(state: Any) -> bool:
    return isinstance(
        state, (_Rms, _RmsWithCount, _Stddev, _StddevWithCount, ScaleByStddevState)
    )


def _convert(opt_state: PyTree, convert: Callable[[Any], Any]) -> PyTree:
    """Convert each state of centered RMSProp within a state."""

    def visit(state):
        if isinstance(state, (_Rms, _RmsWithCount)):
            return state._replace(nu=_map(lambda nu: nu, state.nu))
        return convert(state) if _is_rmsprop(state) else state

    return jax.tree.map(visit, opt_state, is_leaf=_is_rmsprop)


def _check(opt_state: PyTree, decay: Any, verb: str, centered: tuple[Any, ...]) -> None:
    """Raise one ``ValueError`` with everything wrong in a state.

    ``centered`` are the classes that the states of centered RMSProp may have.
    """
    problems = Problems(f"the state cannot be {verb}")
    states = jax.tree.leaves_with_path(opt_state, is_leaf=_is_rmsprop)
    states = [(path, state) for path, state in states if _is_rmsprop(state)]
    if not states:
        problems.add(f"there is no state of RMSProp in {jax.tree.structure(opt_state)}")
    for path, state in states:
        where = dotted_name(path) if path else "the state"
        if not isinstance(state, (_Rms, _RmsWithCount, *centered)):
            problems.add(f"{where} is {type(state).__name__} already")
            continue
        _check_state(problems, where, state, decay)
    problems.raise_any()


def _check_state(problems: Problems, where: str, state: Any, decay: Any) -> None:
    fields = state._asdict()
    count = fields.pop("count", None)
    if count is not None:
        problems.attempt(reading.read_count, f"{where}.count", count)
        if "mu" in fields and decay is None:
            problems.add(
                f"{where} has bias correction; pass the decay of the optimizer"
            )
        elif "mu" in fields:
            bounds = {"high": 1, "exclude_high": True}
            problems.attempt(reading.read_number, "decay", decay, **bounds)
    columns = {}
    for field, tree in fields.items():
        for path, leaf in jax.tree.leaves_with_path(tree):
            name = f"{where}.{field}" + (f".{dotted_name(path)}" if path else "")
            array = problems.attempt(
                reading.read_array, name, leaf, nonnegative=field != "mu"
            )
            columns.setdefault(str(path), {})[name] = array
    for column in columns.values():
        shapes = {name: np.shape(array) for name, array in column.items()}
        if len(shapes) < len(fields) or len(set(shapes.values())) > 1:
            problems.add(f"{where} needs {' and '.join(fields)} of one shape: {shapes}")
        elif fields.keys() == {"mu", "nu"}:
            mu, nu = column.values()
            if mu is None or nu is None:
                continue
            dtype = jax.tree.leaves(fields["nu"])[0].dtype
            if variances.is_less_than_square(np.real(nu), mu, dtype):
                problems.add(f"{' is more than the root of '.join(column)}; swapped?")


def _weight(count: Any, decay: Any) -> float:
    """The sum of the weights in an average; 1 without bias correction."""
    if count is None or int(count) == 0 or decay == 0:
        return 1.0
    return -math.expm1(int(count) * math.log(decay))


def _map(function: Callable[..., np.ndarray], *trees: PyTree) -> PyTree:
    """Map a function of NumPy arrays; the result is placed as the first tree is."""

    def on_devices(first, *rest):
        result = function(*map(reading.to_numpy, (first, *rest)))
        is_placed = isinstance(first, jax.Array) and first.committed
        return jax.device_put(result, first.sharding if is_placed else None)

    return jax.tree.map(on_devices, *trees)


def _variance(nu: np.ndarray, mu: np.ndarray, weight: float) -> np.ndarray:
    return variances.variance(np.real(nu), math.sqrt(weight) * np.abs(_widen(mu)))


def _mean_square(variance: np.ndarray, mu: np.ndarray, weight: float) -> np.ndarray:
    """The inverse of `_variance`, complex as the mean is."""
    mean = math.sqrt(weight) * np.abs(_widen(mu))
    return variances.mean_square(variance, mean, variance.dtype).astype(mu.dtype)


def _divide(mu: np.ndarray, weight: float) -> np.ndarray:
    return (_widen(mu) / weight).astype(mu.dtype)


def _multiply(mu: Any, weight: float) -> np.ndarray:
    """The inverse of `_divide`."""
    if np.iscomplexobj(mu):
        parts = [_multiply(x, weight) for x in (mu.real, mu.imag)]
        return np.stack(parts, axis=-1).view(mu.dtype)[..., 0]
    guess = (_widen(mu) * weight).astype(mu.dtype)
    return exact_inverse(lambda x: _divide(x, weight), guess, mu)


def _widen(array: np.ndarray) -> np.ndarray:
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)
