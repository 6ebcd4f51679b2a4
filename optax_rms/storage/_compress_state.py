# SPDX-License-Identifier: Apache-2.0
"""The wrapper that stores moments in fewer bytes, whatever optimizer they belong to."""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import GetAttrKey, keystr, tree_leaves_with_path

from optax_rms._types import PyTree
from optax_rms.storage._formats import Minifloat
from optax_rms.storage._rounding import rounding_bits


class CompressState(NamedTuple):
    """State of `compress_state`.

    Attributes:
      rounding_step: number of updates so far, modulo 2^32, uint32 scalar. Together with
        the position of an element it determines how the element is rounded.
      formats: the compressed fields and their formats, as the keys of a dict without
        values, such as ``{"nu=UE6M2@-46": None}``. So they belong to the structure of
        the tree, which `jax.jit` does not trace, and which libraries for checkpoints
        store, and compare before they restore.
      inner_state: state of the wrapped transformation, with codes in the compressed
        fields.
    """

    rounding_step: jax.Array
    formats: dict[str, None]
    inner_state: Any


def compress_state(
    inner: optax.GradientTransformation, **formats: Minifloat
) -> optax.GradientTransformationExtraArgs:
    r"""Keep fields of an optimizer's state in one or two bytes per element.

    For a field :math:`v` of the state of ``inner``, which is stored as codes :math:`c`,
    an update is

    .. math::
      v_{t-1} &= \text{decode}(c_{t-1}) \\
      u_t, v_t &= \text{inner.update}(g_t, v_{t-1}) \\
      c_t &= \text{encode}(v_t, r_t)

    with random bits :math:`r_t`, a hash of element, array and step. The rounding is
    unbiased, and the update :math:`u_t` does not see it before the next step, so that
    any bound that ``inner`` puts on the update still holds. `Minifloat` says what each
    format costs in accuracy.

    Fields are found by name in every ``NamedTuple`` and dataclass of the state, through
    ``optax.chain``, ``inject_hyperparams``, ``partition``, ``masked`` and the like. The
    keys of dictionaries are no fields, since they may be names of parameters.

    =====================  ==========================================================
    optimizer              fields
    =====================  ==========================================================
    RMSProp                ``nu``, or ``mu`` and ``variance`` if centered; ``trace``
    Adam                   ``nu``, ``mu``
    Adagrad                ``sum_of_squares``
    SGD with momentum      ``trace``
    Lion                   ``mu``
    =====================  ==========================================================

    * Codes have the shape and the sharding of the array they stand for, and the same
      bits under any sharding. (Not in ``jax.shard_map``: shards count their elements
      from 0 each. Nor do the members of a ``jax.vmap`` have random bits of their own.)
    * Complex and 64-bit arrays stay as they are. What is narrower than float32, also of
      the gradients and of other fields, is widened for ``inner`` and narrowed again.
      So let ``optax.apply_if_finite``, which insists on the dtypes of its state, wrap,
      and ``optax.lookahead``, whose updates are not like its gradients.
    * Derivatives do not pass through codes.
    * Values that ``inner`` leaves alone, as ``optax.MultiSteps`` does between updates,
      keep their codes, unless the format has a ``decay``: then wrap what is inside.
    * In a compiled step with a donated state, a byte per element for Adagrad, Adam or
      RMSProp, XLA on the CPU moves 3/4 of the memory that float32 needs. It computes
      parameters and codes in two loops, and copies the old codes for both to read. If
      RMSProp has momentum, it also keeps the update in float32, and moves 6/5. For an
      H100 each array is one kernel, which moves no more than it must.
    * Arrays of one shape have random bits of their own each, so XLA compiles every one
      for itself: a few seconds for a hundred arrays, where float32 takes one.
    * With ``eps`` outside the root, as in Adam, averages down to ``eps**2`` matter.
      `Minifloat.for_eps` moves the window there.

    See `count_extremes` for whether a window fits, and `recompress_state` and
    `decompress_state` for the way from an uncompressed run and back.

    Args:
      inner: any gradient transformation.
      **formats: a format for each field that is to be compressed, signed for ``mu`` and
        ``trace``, and wherever else numbers may be negative.

    Returns:
      A gradient transformation with a `CompressState`.

    Raises:
      ValueError: there are no formats, or that of ``mu`` or ``trace`` is not signed; in
        ``init``, a field does not exist or has no array that can be compressed; in
        ``update``, the state has other formats.
      TypeError: a format is not a `Minifloat`; in ``update``, the state is not a
        `CompressState`.

    Example:
      Averages of 0.1 and of 1e-9, in one byte each:

      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_rms
      >>> squares = jnp.array([[0.1], [1e-9]])
      >>> gradients = jnp.sqrt(squares) * jnp.ones((2, 50_000))
      >>> tx = optax_rms.compress_state(optax.scale_by_rms(), nu=optax_rms.UE6M2)
      >>> state = tx.init(gradients)
      >>> for _ in range(100):
      ...     _, state = tx.update(gradients, state)
      >>> state.inner_state.nu.nbytes
      100000
      >>> nu = optax_rms.decompress_state(state).nu
      >>> print((nu.mean(axis=1) / squares[:, 0]).round(2))
      [1. 1.]
    """
    _check_formats(formats)
    inner = optax.with_extra_args_support(inner)
    names = {f"{field}={formats[field].name}": None for field in sorted(formats)}

    def init(params) -> Any:
        inner_state = inner.init(params)
        # A node of the parameters may have an attribute with the name of a field.
        opaque = _node_types(jax.tree.structure(params)) - {tuple, list, dict}
        fields = _fields(inner_state, formats, _is_compressible, opaque)
        # optax.tree_map_params calls with a placeholder, which has no leaves.
        if jax.tree.leaves(params):
            _check_fields(formats, fields, inner_state, opaque)
        step = jnp.zeros((), jnp.uint32)
        codes = _encode_fields(inner_state, inner_state, fields, formats, step)
        return CompressState(step, names, codes)

    def update(updates, state, params=None, **extra_args) -> tuple[Any, Any]:
        _check_state(state, names)
        step, _, codes = state
        fields = _fields(codes, formats, _has_codes)
        values = _decode_fields(codes, fields, formats, step)
        wide_updates, values = jax.tree.map(_widen, (updates, values))
        new_updates, values = inner.update(wide_updates, values, params, **extra_args)
        new_updates = jax.tree.map(_narrow, new_updates, updates)
        codes = _encode_fields(values, codes, fields, formats, step + 1)
        return new_updates, CompressState(step + 1, names, codes)

    return optax.GradientTransformationExtraArgs(init, update)


def decompress_state(state: Any) -> Any:
    """The float32 view of a compressed state: the state that ``inner`` would have.

    For reading it, for exporting it, and to go on without compression, for which it is
    all that ``inner`` needs. A state that ``jax.vmap`` made needs ``jax.vmap`` here, as
    it does in `recompress_state`.

    Args:
      state: a `CompressState`, or any state that contains some.

    Returns:
      ``state`` with every `CompressState` replaced by the state of what it wraps, with
      float32 values in place of the codes.

    Raises:
      ValueError: ``state`` contains no `CompressState`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_rms
      >>> adagrad = optax.adagrad(0.1, initial_accumulator_value=0.5)
      >>> tx = optax_rms.compress_state(adagrad, sum_of_squares=optax_rms.UE8M8)
      >>> state = tx.init(jnp.zeros(3))
      >>> print(optax.tree.get(state, "sum_of_squares"))
      [32256 32256 32256]
      >>> print(optax.tree.get(optax_rms.decompress_state(state), "sum_of_squares"))
      [0.5 0.5 0.5]
    """
    _compressed_states(state)
    return jax.tree.map(_decompress, state, is_leaf=_is_compressed)


def recompress_state(state: Any, values: Any) -> Any:
    """A compressed state with the contents of an uncompressed one.

    To go on with compression from a run that had none, or from an imported state, give
    a fresh ``state`` from ``init``, and the state of the run as ``values``.

    Args:
      state: a `CompressState`, or any state that contains some.
      values: a state like ``decompress_state(state)``.

    Returns:
      A state like ``state``, with the contents of ``values``, rounded stochastically.

    Raises:
      ValueError: ``state`` contains no `CompressState`, or ``values`` differs from
        ``decompress_state(state)`` in structure or in the shape of an array.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_rms
      >>> adam, params = optax.adam(0.1), jnp.zeros(3)
      >>> _, values = adam.update(jnp.ones(3), adam.init(params))
      >>> tx = optax_rms.compress_state(adam, nu=optax_rms.UE8M8)
      >>> state = optax_rms.recompress_state(tx.init(params), values)
      >>> print(optax.tree.get(optax_rms.decompress_state(state), "nu").round(5))
      [0.001 0.001 0.001]
    """
    _check_values(values, jax.eval_shape(decompress_state, state))
    return jax.tree.map(_recompress, state, values, is_leaf=_is_compressed)


def compressed_leaves(state: Any) -> Iterator[tuple[str, Minifloat, jax.Array]]:
    """Field, format and codes of every compressed array in a state.

    Raises:
      ValueError: ``state`` contains no `CompressState`.
    """
    for compressed in _compressed_states(state):
        formats, codes = _formats(compressed), compressed.inner_state
        fields = _fields(codes, formats, _has_codes)
        for field, code in zip(fields, jax.tree.leaves(codes), strict=True):
            if field is not None:
                yield field, formats[field], code


def _fields(
    inner_state: PyTree,
    formats: Mapping[str, Minifloat],
    accepts: Callable[[Any, Minifloat], bool],
    opaque: Collection[type] = (),
) -> list[str | None]:
    """The field of each leaf, if it is one of ``formats`` and the leaf is accepted.

    Inside nodes of ``opaque`` types and inside other compressed states there are none.
    """
    fields = []
    for path, node in _nodes(inner_state, opaque):
        field = next((name for name in _attributes(path) if name in formats), None)
        fields += [
            field if field is not None and accepts(leaf, formats[field]) else None
            for leaf in jax.tree.leaves(node)
        ]
    return fields


def _nodes(inner_state: PyTree, opaque: Collection[type]) -> list[tuple[Any, Any]]:
    return tree_leaves_with_path(
        inner_state, is_leaf=lambda n: _is_compressed(n) or type(n) in opaque
    )


def _attributes(path) -> list[str]:
    return [key.name for key in path if isinstance(key, GetAttrKey)]


def _encode_fields(values, like, fields, formats, step):
    """The codes of the fields; other leaves get the dtypes that ``like`` has."""
    old_leaves, treedef = jax.tree.flatten(like)
    leaves = treedef.flatten_up_to(values)
    for i, (leaf, old, field) in enumerate(
        zip(leaves, old_leaves, fields, strict=True)
    ):
        if field is None:
            leaves[i] = _narrow(leaf, old)
        else:
            leaves[i] = _encode(formats[field], leaf, step, np.uint32(i))
    return treedef.unflatten(leaves)


def _decode_fields(codes, fields, formats, step):
    leaves, treedef = jax.tree.flatten(codes)
    for i, (leaf, field) in enumerate(zip(leaves, fields, strict=True)):
        if field is not None:
            leaves[i] = _decode(formats[field], leaf, step)
    return treedef.unflatten(leaves)


# Compiled for themselves, so that they are traced once per shape and not once per leaf.
@functools.partial(jax.jit, static_argnums=0)
def _encode(format, x, step, leaf):
    return format.encode(x, rounding_bits(x.shape, step, leaf), step)


@functools.partial(jax.jit, static_argnums=0)
def _decode(format, code, step):
    return format.decode(code, step)


def _decompress(node: Any) -> Any:
    if not _is_compressed(node):
        return node
    formats, codes = _formats(node), node.inner_state
    fields = _fields(codes, formats, _has_codes)
    values = _decode_fields(codes, fields, formats, node.rounding_step)
    return jax.tree.map(_decompress, values, is_leaf=_is_compressed)


def _recompress(node: Any, values: Any) -> Any:
    if not _is_compressed(node):
        return values
    formats, codes = _formats(node), node.inner_state
    fields = _fields(codes, formats, _has_codes)
    values = jax.tree.map(_recompress, codes, values, is_leaf=_is_compressed)
    codes = _encode_fields(values, codes, fields, formats, node.rounding_step)
    return node._replace(inner_state=codes)


def _compressed_states(state: Any) -> list[CompressState]:
    """The compressed states in ``state``, and those in them; at least one."""
    found = list(_find_compressed(state))
    if not found:
        raise ValueError(
            "state must contain a CompressState, which compress_state makes; there is "
            f"none in this {type(state).__name__}."
        )
    return found


def _find_compressed(tree: PyTree) -> Iterator[CompressState]:
    for node in jax.tree.leaves(tree, is_leaf=_is_compressed):
        if _is_compressed(node):
            yield node
            yield from _find_compressed(node.inner_state)


def _is_compressed(node: Any) -> bool:
    return isinstance(node, CompressState)


def _formats(state: CompressState) -> dict[str, Minifloat]:
    pairs = (name.split("=") for name in state.formats)
    return {field: Minifloat.from_name(format_name) for field, format_name in pairs}


def _node_types(treedef: Any) -> set[type]:
    """The types of the inner nodes of a tree."""
    node = treedef.node_data()
    types = set() if node is None else {node[0]}
    return types.union(*map(_node_types, treedef.children()))


def _is_compressible(leaf: Any, format: Minifloat | None = None) -> bool:
    del format
    dtype = getattr(leaf, "dtype", np.dtype(bool))
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize <= 4


def _has_codes(leaf: Any, format: Minifloat) -> bool:
    return getattr(leaf, "dtype", None) == format.dtype


def _is_half(leaf: Any) -> bool:
    return _is_compressible(leaf) and leaf.dtype.itemsize < 4


def _widen(leaf: Any) -> Any:
    return leaf.astype(jnp.float32) if _is_half(leaf) else leaf


def _narrow(leaf: Any, like: Any) -> Any:
    """Undo what `_widen` did to ``like``."""
    return leaf.astype(like.dtype) if _is_half(like) else leaf


def _check_formats(formats: Mapping[str, Any]) -> None:
    if not formats:
        raise ValueError(
            "compress_state needs the format of at least one field, such as nu=UE6M2."
        )
    bad = [
        f"{field}={format!r}"
        for field, format in formats.items()
        if not isinstance(format, Minifloat)
    ]
    if bad:
        raise TypeError(
            "compress_state takes fields and their formats, each a Minifloat such as "
            f"UE6M2; got {', '.join(bad)}."
        )
    unsigned = [f for f in ("mu", "trace") if f in formats and not formats[f].signed]
    if unsigned:
        raise ValueError(
            f"the format of {' and '.join(unsigned)} must be signed, such as SE5M2 or "
            "SE8M7: an unsigned one makes negative numbers 0."
        )


def _check_fields(formats, fields, inner_state, opaque) -> None:
    """Raise a ``ValueError`` unless every field is found and has leaves to compress."""
    missing = [field for field in formats if field not in fields]
    if not missing:
        return
    dtypes: dict[str, set[str]] = {}
    for path, node in _nodes(inner_state, opaque):
        for field in _attributes(path):
            dtypes.setdefault(field, set()).update(
                str(getattr(leaf, "dtype", type(leaf).__name__))
                for leaf in jax.tree.leaves(node)
            )
    found = "; ".join(
        f"{field} ({', '.join(sorted(d))})" for field, d in dtypes.items()
    )
    raise ValueError(
        f"compress_state finds nothing to compress in {', '.join(missing)}, where it "
        "needs real arrays of at most 32 bits. The fields of the state are "
        f"{found or 'none'}."
    )


def _check_state(state: Any, names: dict[str, None]) -> None:
    if not _is_compressed(state):
        raise TypeError(
            "compress_state needs the CompressState that its init returns, got "
            f"{type(state).__name__}; to compress the state of what it wraps, use "
            "recompress_state."
        )
    if state.formats != names:
        raise ValueError(
            f"the state has the formats {list(state.formats)}, but compress_state was "
            f"given {list(names)}; to convert it, use decompress_state, then "
            "recompress_state."
        )


def _check_values(values: Any, expected: Any) -> None:
    """Raise a ``ValueError`` naming every array that has not the expected shape."""
    structure, expected_structure = map(jax.tree.structure, (values, expected))
    if structure != expected_structure:
        raise ValueError(
            "values must have the structure of decompress_state(state), which is "
            f"{expected_structure}; got {structure}."
        )
    bad = [
        f"{keystr(path)} has shape {np.shape(leaf)}, not {like.shape}"
        for (path, leaf), like in zip(
            tree_leaves_with_path(values), jax.tree.leaves(expected), strict=True
        )
        if np.shape(leaf) != like.shape
    ]
    if bad:
        raise ValueError(
            f"values must have the shapes of decompress_state(state); {'; '.join(bad)}."
        )
