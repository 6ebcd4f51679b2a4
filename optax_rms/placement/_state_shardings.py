# SPDX-License-Identifier: Apache-2.0
"""The sharding that the state of an optimizer should have, from its parameters'."""

import math
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optax_rms._leaf_names import leaf_name
from optax_rms._types import PyTree


def state_shardings(
    tx: optax.GradientTransformation,
    params: PyTree,
    *,
    over: str | None = None,
    strict: bool = False,
) -> PyTree:
    """The tree of ``NamedSharding`` that ``tx.init(params)`` should have.

    Every array of the state that belongs to a parameter is sharded like the parameter,
    and all other arrays, for example step counts, are replicated. With ``over``, arrays
    of the state are split further over that axis of the mesh, on the first dimension
    that divides (ZeRO stage 1): every device then keeps a part of the state and
    computes a part of the update, and XLA gathers the updates.

    The result is for ``jax.jit(tx.init, out_shardings=...)``, for ``jax.device_put``,
    and for the templates of a checkpoint library. Any Optax transformation will do.

    Args:
      tx: a gradient transformation.
      params: the parameters, arrays or ``jax.ShapeDtypeStruct``, each with a
        ``NamedSharding`` on one mesh. Leaves that are ``None`` have no state.
      over: the name of a mesh axis, for example ``"data"``. A parameter that is already
        split over the axis keeps its sharding.
      strict: whether to raise an error, instead of keeping the sharding of the
        parameter, where no dimension divides.

    Returns:
      A tree with the structure of ``tx.init(params)`` and a ``NamedSharding`` for each
      array.

    Raises:
      ValueError: a parameter has no ``NamedSharding`` or lies on another mesh; ``over``
        is no axis of the mesh; or, if ``strict``, arrays that no dimension divides, all
        of which are listed.

    Example:
      A state of eight numbers, split over as many devices as there are:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_rms
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> replicated = NamedSharding(mesh, PartitionSpec())
      >>> params = jax.device_put({"w": jnp.ones(8)}, replicated)
      >>> tx = optax.adam(1e-3)
      >>> shardings = optax_rms.state_shardings(tx, params, over="data")
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
      >>> print(tuple(state[0].nu["w"].sharding.spec))
      ('data',)
      >>> print(tuple(state[0].count.sharding.spec))
      ()

    References:
      Rajbhandari, Rasley, Ruwase and He, 2020, ZeRO: Memory Optimizations Toward
      Training Trillion Parameter Models, section 5.1, https://arxiv.org/abs/1910.02054
    """
    mesh = _mesh(params)
    if over is not None:
        check_axis(over, mesh)
    return shardings_of(tx, jax.eval_shape(tx.init, params), params, over, strict)


def shardings_of(
    tx: optax.GradientTransformation,
    state: PyTree,
    params: PyTree,
    over: str | None,
    strict: bool = False,
) -> PyTree:
    """The shardings that `state_shardings` describes, for a state of ``tx``."""
    mesh = _mesh(params)
    replicated = NamedSharding(mesh, PartitionSpec())
    undivided: set[str] = set()

    def shard(path, param, part):
        """The shardings of all arrays that the state has for one parameter."""

        def shard_array(array):
            if array.shape != param.shape:
                return replicated
            sharding = split(param, over)
            if sharding is None:
                undivided.add(f"{leaf_name(path)} {param.dtype}{list(param.shape)}")
            return sharding or param.sharding

        return jax.tree.map(shard_array, part)

    def shard_all(tree, params):
        return jax.tree_util.tree_map_with_path(
            shard, params, tree, is_leaf=lambda param: param is None
        )

    shardings = optax.tree_map_params(
        tx,
        shard_all,
        state,
        params,
        transform_non_params=lambda _: replicated,
        # All arrays that the state has for the parameters at once: a parameter may
        # have none (an integer) or several (the two parts of a complex number).
        is_leaf=lambda _: True,
    )
    if strict and over is not None and undivided:
        raise ValueError(
            f"no dimension of these parameters divides by the {mesh.shape[over]} "
            f"devices of {over!r}: {', '.join(sorted(undivided))}. Pad them, or pass "
            "strict=False."
        )
    return shardings


def check_axis(over: str, mesh: Mesh) -> None:
    """Raise a ``ValueError`` if ``over`` is no axis of the mesh."""
    if over not in mesh.axis_names:
        raise ValueError(
            f"over must be an axis of the mesh, one of {mesh.axis_names}, got {over!r}."
        )


def _mesh(params: PyTree) -> Mesh:
    """The mesh of all parameters."""
    meshes: dict[Any, str] = {}
    for path, param in jax.tree_util.tree_leaves_with_path(params):
        sharding = getattr(param, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"{leaf_name(path)} must have a NamedSharding, got {sharding}. Place "
                "the parameters first: jax.device_put(params, NamedSharding(mesh, "
                "PartitionSpec()))."
            )
        meshes.setdefault(sharding.mesh, leaf_name(path))
    if len(meshes) != 1:
        found = "; ".join(f"{name} on {mesh}" for mesh, name in meshes.items())
        raise ValueError(f"params must lie on one mesh, got {found or 'no arrays'}.")
    return next(iter(meshes))


def split(param: Any, over: str | None) -> NamedSharding | None:
    """The sharding of a parameter, split over one axis more where one divides."""
    sharding = param.sharding
    axes = [
        axis if isinstance(axis, tuple) else () if axis is None else (axis,)
        for axis in sharding.spec
    ]
    axes += [()] * (len(param.shape) - len(axes))
    if over is None or any(over in names for names in axes):
        return sharding
    for i, (size, names) in enumerate(zip(param.shape, axes, strict=True)):
        parts = math.prod(sharding.mesh.shape[name] for name in (*names, over))
        if size and size % parts == 0:
            axes[i] = (*names, over)
            while not axes[-1]:
                axes.pop()
            spec = [names[0] if len(names) == 1 else names or None for names in axes]
            return NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return None
