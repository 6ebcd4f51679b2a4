# SPDX-License-Identifier: Apache-2.0
"""Quantum Monte Carlo and quantum circuits."""

import optax

from optax_rms import _checks as checks
from optax_rms import _rmsprop
from optax_rms._types import LearningRate


def netket(
    learning_rate: LearningRate = 1e-3,
    centered: bool = False,
    *,
    as_documented: bool = False,
) -> optax.GradientTransformation:
    r"""``RmsProp`` of NetKet, for variational Monte Carlo.

    A decay of 0.9, epsilon 1e-7 and a mean square from 0. The mean square of a complex
    parameter is that of :math:`|g|^2`.

    Loss: the energy, a mean over samples. The gradient may be one of stochastic
    reconfiguration.

    Disputed: the place of epsilon. NetKet calls ``optax.rmsprop``, with epsilon inside
    the root. Epsilon was inside in the older Python code, too, from April 2020 on. The
    documentation of ``RmsProp`` has the formula :math:`\eta / (\sqrt{s_k} + \epsilon)`,
    which is that of the code in C++ until then. The two differ for gradients of 3e-4,
    the root of 1e-7, and below: after many gradients of 1e-6, the steps are 0.003
    learning rates long in the code, and 0.9 in the documentation.

    Args:
      learning_rate: a number, a scalar array, or a schedule.
      centered: whether to divide by the standard deviation.
      as_documented: whether epsilon is outside the root, as in the documentation and
        in the code in C++.

    Returns:
      A gradient transformation.

    Example:
      Gradients of 3e-4, in the code and in the documentation:

      >>> import jax.numpy as jnp
      >>> from optax_rms import recipes
      >>> for as_documented in (False, True):
      ...     tx = recipes.netket(as_documented=as_documented)
      ...     print(tx.update(jnp.full(1, 3e-4), tx.init(jnp.zeros(1)))[0].round(5))
      [-0.00091]
      [-0.00316]

    References:
      Vicentini et al., 2022, NetKet 3: Machine Learning Toolbox for Many-Body Quantum
      Systems, https://doi.org/10.21468/SciPostPhysCodeb.7

      https://github.com/netket/netket/blob/3b9e1c2865/netket/optimizer/__init__.py

      the older code,
      https://github.com/netket/netket/blob/4a6cd3bbe8/Sources/Optimizer/rms_prop.hpp
    """
    is_documented = checks.check_flag("as_documented", as_documented)
    return _rmsprop.rmsprop(
        learning_rate, 0.9, 1e-7, eps_in_sqrt=not is_documented, centered=centered
    )


def pennylane(learning_rate: LearningRate = 0.01) -> optax.GradientTransformation:
    """``RMSPropOptimizer`` of PennyLane, for quantum circuits.

    A decay of 0.9, epsilon 1e-8 inside the root and a mean square from 0: Hinton's
    formula.

    Loss: the cost, for example the expectation value of an observable.

    Args:
      learning_rate: ``stepsize`` of PennyLane: a number, a scalar array, or a schedule.

    Returns:
      A gradient transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_rms import recipes
      >>> tx = recipes.pennylane()
      >>> print(tx.update(jnp.full(1, 1e-4), tx.init(jnp.zeros(1)))[0].round(4))
      [-0.0095]

    References:
      Bergholm et al., 2018, PennyLane: Automatic differentiation of hybrid
      quantum-classical computations, https://arxiv.org/abs/1811.04968

      https://github.com/PennyLaneAI/pennylane/blob/4ac3a0fc72/pennylane/optimize/rms_prop.py
    """
    return _rmsprop.rmsprop(learning_rate, 0.9, 1e-8)
