# SPDX-License-Identifier: Apache-2.0
"""One loop per parameter on a CPU, under an experimental flag of XLA."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from optax_rms._types import PyTree

_OPTION = "xla_cpu_use_multi_output_fusion"


def one_pass(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Compute updates and state in one loop per parameter, on a CPU under a flag.

    On a CPU, XLA emits one loop for each array of the result, and each loop reads its
    inputs from memory again. A float32 step of RMSProp moves 28 bytes per parameter,
    although 20 suffice. An experimental flag of XLA merges loops that share inputs. The
    flag must be set before the first computation of the process, for example in the
    first lines of the program::

        import os

        flags = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

    The flag alone changes little: the loop of the parameters reads the new mean square,
    and XLA does not merge a loop with the loop whose result it reads. `one_pass` calls
    ``inner.update`` once for the updates and once for each field of the state, on
    inputs that XLA cannot know to be equal, and keeps one output of each call. XLA then
    merges these independent loops into one. The result is the same,
    bit for bit. Bytes per parameter of a compiled float32 step with donated parameters
    and state:

    ===========================  =========  ============
    optimizer                    ``inner``  ``one_pass``
    ===========================  =========  ============
    RMSProp                      28         20
    RMSProp, momentum            40         28
    RMSProp, Nesterov            56         28
    RMSProp, centered            44         28
    RMSProp, centered, momentum  56         36
    ``optax.adam``               40         28
    ``optax.lion``               36         20
    ``optax.sgd``, momentum      24         20
    ===========================  =========  ============

    Without the flag, on a GPU or a TPU, and in a step that is not compiled, `one_pass`
    calls ``inner.update`` once, with the arguments unchanged, and the compiled program
    is the same as without `one_pass`. State, checkpoints, derivatives and shardings
    never change.

    * The flag is experimental and applies to every program of the process, also to
      the program of the gradients. The compiler crashes in some programs with the flag
      (https://github.com/openxla/xla/issues/47367, two scatters with the same indices;
      https://github.com/openxla/xla/issues/47385). Try your program with the flag
      first.
    * The step takes about twice as long to compile.
    * XLA merges loops only if their outputs have one shape and one dtype. Codes of
      `compress_state` and residuals of `split_master_weights` therefore stay in other
      loops than the parameters.
    * With the flag and without `one_pass`, `compress_state` and `split_master_weights`
      move more memory than without the flag. With the flag, put `one_pass` outside, for
      example ``one_pass(compress_state(rmsprop(1e-3), nu=UE6M2))``.
    * ``inner.update`` is traced several times and must have no side effects, for
      example ``jax.debug.print``.

    Args:
      inner: any gradient transformation.

    Returns:
      A gradient transformation with the state of ``inner``.

    Raises:
      RuntimeError: in a compiled ``update``, if ``XLA_FLAGS`` has the flag but XLA does
        not merge loops: the variable was set after the first computation, or the
        installed jaxlib is too old.

    Example:
      Without the flag the program is that of ``inner``:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_rms
      >>> inner, params = optax_rms.rmsprop(1e-3), jnp.ones(1000)
      >>> tx = optax_rms.one_pass(inner)
      >>> programs = [
      ...     jax.jit(update).lower(params, inner.init(params), params).as_text()
      ...     for update in (inner.update, tx.update)
      ... ]
      >>> programs[0] == programs[1]
      True

    References:
      OpenXLA, 2025, CpuMultiOutputFusion,
      https://github.com/openxla/xla/blob/main/xla/service/cpu/cpu_multi_output_fusion.cc
    """
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra_args) -> tuple[Any, Any]:
        arguments = updates, state, params
        if not (_is_traced(arguments) and _merges_loops()):
            return inner.update(*arguments, **extra_args)
        shown = jnp.array(True)

        def call() -> tuple[Any, Any]:
            """The update, on inputs that to XLA differ from those of other calls."""
            nonlocal shown
            # One link more for each call, of scalars: XLA would copy an array.
            shown = jax.lax.optimization_barrier(shown)
            veiled = jax.tree.map(functools.partial(_veil, shown), arguments)
            return inner.update(*veiled, **extra_args)

        new_updates, new_state = call()
        leaves, treedef = jax.tree.flatten(new_state)
        fields = _fields(updates, new_state)
        for field in dict.fromkeys(f for f in fields if f is not None):
            of_call = jax.tree.leaves(call()[1])
            for i, own in enumerate(fields):
                if own == field:
                    leaves[i] = of_call[i]
        return new_updates, treedef.unflatten(leaves)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _veil(shown: jax.Array, x: Any) -> jax.Array:
    """``x``, bit for bit, if ``shown`` is true.

    A product with 1 would make subnormal numbers 0.
    """
    return jax.lax.select(shown, x, jax.lax.full_like(x, 0))


def _fields(updates: PyTree, state: PyTree) -> list[Any]:
    """For each leaf of the state its field, for example ``nu``.

    That is the path of the leaf without the path of the parameter. Scalars, and arrays
    that belong to no parameter, have None.
    """
    params = {path for path, _ in jax.tree_util.tree_leaves_with_path(updates)}

    def field(path, leaf):
        if jnp.ndim(leaf):
            for stop in range(len(path), -1, -1):
                for start in range(stop + 1):
                    if path[start:stop] in params:
                        return path[:start], path[stop:]
        return None

    return [field(*leaf) for leaf in jax.tree_util.tree_leaves_with_path(state)]


def _is_traced(tree: PyTree) -> bool:
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def _merges_loops() -> bool:
    """Whether XLA merges loops in the programs of this process."""
    asked = _OPTION in os.environ.get("XLA_FLAGS", "")
    if not asked or jax.default_backend() != "cpu":
        return False
    if _loops_of_two_outputs() != 1:
        raise RuntimeError(
            f"XLA_FLAGS has {_OPTION}, but XLA does not merge loops. Set XLA_FLAGS "
            "before the first computation of the process, for example in the first "
            "lines of the program. If XLA_FLAGS was set in time, update jaxlib: "
            "version 0.6.0, for example, does not have the option."
        )
    return True


@functools.cache
def _loops_of_two_outputs() -> int:
    # XLA reads XLA_FLAGS once, and ignores options that it does not know.
    two_outputs = jax.jit(lambda x: (x + 1, x + 2))
    compiled = two_outputs.lower(jax.ShapeDtypeStruct((2,), jnp.float32)).compile()
    return str(compiled.as_text()).count(" fusion(")
