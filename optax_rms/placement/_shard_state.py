# SPDX-License-Identifier: Apache-2.0
"""The wrapper that keeps the state of any Optax optimizer in parts on a mesh."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from optax_rms._alike import state_like
from optax_rms._leaf_names import leaf_name
from optax_rms._types import PyTree
from optax_rms.placement._state_shardings import check_axis, shardings_of, split

if hasattr(jax.sharding, "reshard"):
    from jax.sharding import reshard
else:  # JAX 0.6
    reshard = importlib.import_module("jax.experimental.shard").reshard


def shard_state(
    inner: optax.GradientTransformation,
    mesh: Mesh,
    over: str,
    specs: PyTree = None,
    *,
    strict: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Keep the state split over an axis of the mesh, for training loops of others.

    Flax' ``TrainState`` and ``nnx.Optimizer`` and many loops call ``init`` and
    ``update`` themselves, and leave no place for the result of `state_shardings`. This
    wrapper places the state as ``state_shardings(inner, params, over=over)`` says, in
    ``init`` and in ``update``, eagerly and under ``jax.jit`` (ZeRO stage 1). Every
    device keeps a part of the state and computes a part of the update. Updates come
    back with the shardings of the parameters: XLA gathers each of them once.

    * Structure, shapes and dtypes of the state are those of ``inner``. With the
      gradients of a run without the wrapper, updates and state have the bits of that
      run. The new parameters have the bits of a sum of parameter and update. Without
      the wrapper XLA may fuse that sum with the last product of the update, and round
      both once.
    * Parameters on the mesh from the start, for example by ``jax.device_put``, have the
      step compiled once.
    * The new parameters have the shardings of the old parameters. With the partitioner
      of JAX 0.6 (GSPMD) they may come out in parts; there, set ``out_shardings``, or
      ``jax.config.update("jax_use_shardy_partitioner", True)``.

    Args:
      inner: any transformation. It should be the whole optimizer, because a
        transformation outside this wrapper computes on whole updates.
      mesh: the mesh of the parameters. Its axes are all of type ``Auto``, or all of
        type ``Explicit``.
      over: the name of the axis that the state is split over, for example ``"data"``.
      specs: on a mesh of type ``Auto``, the shardings of the parameters, which a
        compiled function cannot see: a ``PartitionSpec`` for each parameter, in a tree
        like the parameters, or one for all, for example ``PartitionSpec("model")``.
        ``None``, the default, means replicated. On a mesh of type ``Explicit`` the
        types of the parameters contain their shardings, and ``specs`` must be ``None``.
      strict: whether to raise an error in ``init``, instead of keeping the sharding of
        the parameter, where no dimension divides. The error lists all such parameters.

    Returns:
      A gradient transformation with the state of ``inner``. Its ``update`` passes
      further keyword arguments to ``inner``.

    Raises:
      TypeError: ``mesh`` is no ``jax.sharding.Mesh``.
      ValueError: ``over`` is no axis of the mesh; the axes have several types, or are
        ``Manual``; ``specs`` names an axis that is not there, is not like the
        parameters, or is given for an explicit mesh. In ``init``, parameters lie on
        another mesh, or otherwise than ``specs`` says; or, if ``strict``, arrays that
        no dimension divides, all of which are listed.

    Example:
      A state of eight numbers, split over as many devices as there are, with
      parameters on all of them:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_rms
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> replicated = NamedSharding(mesh, PartitionSpec())
      >>> params = jax.device_put({"w": jnp.ones(8)}, replicated)
      >>> tx = optax_rms.shard_state(optax.adam(1e-3), mesh, "data")
      >>> state = tx.init(params)
      >>> updates, state = jax.jit(tx.update)(params, state, params)
      >>> print(tuple(state[0].nu["w"].sharding.spec))
      ('data',)
      >>> print(updates["w"].sharding.is_fully_replicated)
      True

    References:
      Rajbhandari, Rasley, Ruwase and He, 2020, ZeRO: Memory Optimizations Toward
      Training Trillion Parameter Models, section 5.1, https://arxiv.org/abs/1910.02054
    """
    is_explicit = _check_mesh(mesh)
    check_axis(over, mesh)
    if is_explicit and specs is not None:
        raise ValueError(
            "specs must be None on a mesh of type Explicit, where the types of the "
            f"parameters have their specs; got {specs!r}."
        )
    inner = optax.with_extra_args_support(inner)

    def on_mesh(tree: PyTree) -> PyTree:
        """Shapes and dtypes with the shardings of the parameters."""

        def leaf_on_mesh(path: Any, leaf: Any, spec: Any = None) -> Any:
            if is_explicit:
                spec = _sharding_in_type(leaf).spec
            sharding = _check_spec(path, spec, mesh)
            shape, dtype = np.shape(leaf), jnp.result_type(leaf)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        trees = (tree,) if is_explicit else (tree, _broadcast(specs, tree))
        return jax.tree_util.tree_map_with_path(leaf_on_mesh, *trees)

    def init(params) -> Any:
        like = on_mesh(params)
        if not jax.tree.leaves(like):  # Also in `optax.tree_map_params`.
            return inner.init(params)
        _check_place(params, like)
        # The state of parts is in parts from the start, also in an eager loop.
        params = _place(params, _parts(like, over))
        state = state_like(params, inner.init(params))
        return _place(state, shardings_of(inner, state, like, over, strict))

    def update(updates, state, params=None, **extra_args) -> tuple[Any, Any]:
        like = on_mesh(updates if params is None else params)
        if not jax.tree.leaves(like):
            return inner.update(updates, state, params, **extra_args)
        parts = _parts(like, over)
        updates, state = inner.update(
            _place(updates, parts),
            state,
            None if params is None else _place(params, parts),
            **extra_args,
        )
        state = _place(state, shardings_of(inner, state, like, over))
        # Otherwise XLA may gather an earlier result, and compute the rest of the update
        # on every device, rounded together with the sum of parameter and update.
        updates = _place(updates, parts)
        whole = jax.tree.map(lambda leaf: leaf.sharding, like)
        return _place(updates, whole), state

    return optax.GradientTransformationExtraArgs(init, update)


def _parts(like: PyTree, over: str) -> PyTree:
    return jax.tree.map(lambda leaf: split(leaf, over) or leaf.sharding, like)


def _place(tree: PyTree, shardings: PyTree) -> PyTree:
    """The arrays of a tree with these shardings, and whatever else is there."""

    def place(sharding: Any, leaf: Any) -> Any:
        if sharding is None or leaf is None:
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        if not isinstance(leaf, Tracer):
            return jax.device_put(leaf, sharding)
        if AxisType.Explicit in sharding.mesh.axis_types:
            return reshard(leaf, sharding)
        return jax.lax.with_sharding_constraint(leaf, sharding)

    return jax.tree.map(place, shardings, tree, is_leaf=lambda s: s is None)


def _broadcast(specs: PyTree, tree: PyTree) -> PyTree:
    """A spec for each leaf of ``tree``."""
    specs = PartitionSpec() if specs is None else specs
    try:
        return jax.tree.map(
            lambda spec, part: jax.tree.map(lambda _: spec, part), specs, tree
        )
    except ValueError as error:
        raise ValueError(
            "specs must be a PartitionSpec, or a tree like the parameters with a "
            f"PartitionSpec for each. {error}"
        ) from error


def _sharding_in_type(leaf: Any) -> Any:
    typed = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    return typed.sharding


def _check_mesh(mesh: Any) -> bool:
    """Whether the mesh is explicit, or an error if it is neither that nor automatic."""
    if not isinstance(mesh, Mesh):
        raise TypeError(
            "mesh must be a jax.sharding.Mesh, for example jax.make_mesh((8,), "
            f"('data',)), got {mesh!r} of type {type(mesh).__name__}."
        )
    types = set(mesh.axis_types)
    if types not in ({AxisType.Auto}, {AxisType.Explicit}):
        found = {
            name: kind.name
            for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        }
        raise ValueError(
            "the axes of the mesh must all be of type Auto, or all of type Explicit, "
            f"got {found}."
        )
    return types == {AxisType.Explicit}


def _check_spec(path: Any, spec: Any, mesh: Mesh) -> NamedSharding:
    names = jax.tree.leaves(tuple(spec)) if isinstance(spec, PartitionSpec) else [None]
    if not set(names) <= set(mesh.axis_names):
        raise ValueError(
            f"the spec of {leaf_name(path)} must be a PartitionSpec of the axes "
            f"{mesh.axis_names}, got {spec!r}."
        )
    return NamedSharding(mesh, spec)


def _check_place(params: PyTree, like: PyTree) -> None:
    """Raise a ``ValueError`` naming all parameters that lie elsewhere on a mesh."""
    bad = []
    for (path, p), expected in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(like), strict=True
    ):
        found = None if isinstance(p, Tracer) else getattr(p, "sharding", None)
        if isinstance(found, NamedSharding) and not (
            found.mesh == expected.sharding.mesh
            and found.is_equivalent_to(expected.sharding, len(p.shape))
        ):
            bad.append(f"{leaf_name(path)} lies as {found}, not {expected.sharding}")
    if bad:
        raise ValueError(
            "parameters must lie on the mesh of shard_state as specs says, which by "
            f"default is replicated: {'; '.join(bad)}. Pass their PartitionSpec as "
            "specs, or place them first with jax.device_put."
        )
