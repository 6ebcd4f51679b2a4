# SPDX-License-Identifier: Apache-2.0
"""The wrapper that stores moments in fewer bytes, whatever optimizer they belong to."""

import functools
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import GetAttrKey, keystr, tree_leaves_with_path
from jax.typing import ArrayLike

from optax_rms import _checks as checks
from optax_rms._alike import state_like
from optax_rms._numerics import is_half, widen
from optax_rms._types import PyTree
from optax_rms.storage._fingerprint import check_fingerprint, fingerprint, reject
from optax_rms.storage._formats import Minifloat
from optax_rms.storage._rounding import leaf_numbers, rounding_bits

_CONVERSION = "decompress_state and recompress_state"


class CompressState(NamedTuple):
    """State of `compress_state`.

    Attributes:
      rounding_step: number of updates so far, modulo 2^32, uint32 scalar. The random
        bits of an element are a hash of this number and of the element's position.
      formats: fingerprint of ``fields``, uint32 scalar. A serialiser stores it beside
        the codes, so that codes of other formats are recognized.
      inner_state: state of the wrapped transformation, with codes in the compressed
        fields.
      fields: the compressed fields and their formats, as the keys of a dict without
        values, for example ``{"nu=UE6M2@-46": None}``. The keys belong to the structure
        of the tree, which `jax.jit` does not trace, and which libraries for checkpoints
        store, and compare before they restore.
      rounding_seed: the number that `seed_rounding` set, uint32 scalar, or ``None``.

    States of version 0.1 had ``fields`` in the place of ``formats`` and no fingerprint.
    Such a state from a pickle is read, and keeps this layout.
    """

    rounding_step: jax.Array
    formats: jax.Array | dict[str, None]
    inner_state: Any
    fields: dict[str, None] | None = None
    rounding_seed: jax.Array | None = None


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
    unbiased, and affects the updates from the next step on, so that any bound of
    ``inner`` on the update still holds. One byte per parameter and field has a worst
    relative error of 25 % for each rounding, two bytes 0.4 % (unsigned, for squares)
    or 0.8 % (signed); float32 has four bytes. `Minifloat` gives the noise of averages.

    Fields are found by name in every ``NamedTuple`` and dataclass of the state, through
    ``optax.chain``, ``inject_hyperparams``, ``partition``, ``masked`` and other
    wrappers. The keys of dictionaries are no fields, since they may be names of
    parameters.

    =====================  ==========================================================
    optimizer              fields
    =====================  ==========================================================
    RMSProp                ``nu``, or ``mu`` and ``variance`` if centered; ``trace``
    Adam                   ``nu``, ``mu``
    Adagrad                ``sum_of_squares``
    SGD with momentum      ``trace``
    Lion                   ``mu``, in two bytes (`SE8M7`)
    =====================  ==========================================================

    * Codes have the shape and the sharding of the array that they encode, and the same
      bits under any sharding. (Not in ``jax.shard_map``: shards count their elements
      from 0 each.)
    * The members of a ``jax.vmap`` share their random bits, until `seed_rounding` gives
      each member its own.
    * Complex and 64-bit arrays stay as they are. Gradients and fields narrower than
      float32 are widened for ``inner`` and narrowed again. Put
      ``optax.apply_if_finite`` outside, for example
      ``optax.apply_if_finite(compress_state(...), 5)``, because it compares the dtypes
      of its state. Put ``optax.lookahead`` outside, because its updates are pairs.
    * Leaves of an integer or boolean dtype have no state: ``inner`` receives ``None``
      in place of them and of their gradients. Where ``inner`` accepts a gradient of
      ``None`` for another leaf, the state of that leaf does not change.
    * Derivatives do not pass through codes.
    * Values that ``inner`` leaves unchanged keep their codes, unless the format has a
      ``decay``: then put, for example, ``optax.MultiSteps`` outside,
      ``optax.MultiSteps(compress_state(...), 4)``.
    * In a compiled step with a donated state, one byte per element for Adagrad, Adam or
      RMSProp, XLA on the CPU moves 3/4 of the memory that float32 needs. XLA computes
      parameters and codes in two loops, and copies the old codes for both to read. If
      RMSProp has momentum, XLA also keeps the update in float32, and moves 6/5. For an
      H100 each array is one kernel, which moves no more memory than necessary.
    * Arrays of one shape have random bits of their own each, so XLA compiles each of
      them: a few seconds for a hundred arrays, where float32 takes one.
    * With ``eps`` outside the root, as in Adam, averages down to ``eps**2`` matter.
      `Minifloat.for_eps` moves the window there.

    See `count_extremes` for whether a window fits, and `recompress_state` and
    `decompress_state` for the conversion from and to an uncompressed run.

    Args:
      inner: any gradient transformation.
      **formats: a format for each field to compress, for example ``nu=UE6M2``; a signed
        format, for example ``mu=SE5M2``, for ``mu`` and ``trace``, and for other fields
        with negative numbers.

    Returns:
      A gradient transformation with a `CompressState`.

    Raises:
      ValueError: there are no formats, or that of ``mu`` or ``trace`` is not signed; in
        ``init``, a field does not exist or has no array that can be compressed; in
        ``update``, the state has other formats, or the codes were stored in other
        formats. In a compiled ``update`` that second case makes all values of the
        compressed fields NaN.
      TypeError: a format is not a `Minifloat`; in ``update``, the state is not a
        `CompressState`, or a gradient is of an integer.

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
        params = checks.check_parameters(params)
        inner_state = inner.init(params)
        # A node of the parameters may have an attribute with the name of a field.
        opaque = _node_types(jax.tree.structure(params)) - {tuple, list, dict}
        fields = _fields(inner_state, formats, _is_compressible, opaque)
        # optax.tree_map_params calls with a placeholder, which has no leaves.
        if jax.tree.leaves(params):
            _check_fields(formats, fields, inner_state, opaque)
        step = jnp.zeros((), jnp.uint32)
        codes = _encode_fields(inner_state, inner_state, fields, formats, step, None)
        codes = state_like(params, codes)
        return CompressState(step, fingerprint(_description(names)), codes, names)

    def update(updates, state, params=None, **extra_args) -> tuple[Any, Any]:
        _check_state(state, names)
        checks.check_inexact_leaves("gradients", updates)
        params = checks.check_parameters(params)
        # A restored step may be NumPy's, whose version 1 makes int64 of step + 1.
        step, codes = jnp.asarray(state.rounding_step), state.inner_state
        fields = _coded_fields(codes, formats)
        intact = _check_codes(state)
        values = _decode_fields(codes, fields, formats, step, intact)
        wide_updates, values = jax.tree.map(widen, (updates, values))
        new_updates, new = inner.update(wide_updates, values, params, **extra_args)
        new_updates = jax.tree.map(_narrow, new_updates, updates)
        # Optax has None in the new state where the gradient is None.
        new = jax.tree.map(lambda old, new: old if new is None else new, values, new)
        codes = _encode_fields(
            new, codes, fields, formats, step + 1, state.rounding_seed, intact
        )
        return new_updates, state._replace(rounding_step=step + 1, inner_state=codes)

    return optax.GradientTransformationExtraArgs(init, update)


def decompress_state(state: Any) -> Any:
    """The float32 state in a compressed state: the state that ``inner`` would have.

    The purpose is reading, export, and training without compression from here on: the
    result is a state of ``inner``. A state from ``jax.vmap`` needs ``jax.vmap`` here
    and in `recompress_state`.

    Args:
      state: a `CompressState`, or any state that contains some.

    Returns:
      ``state`` with every `CompressState` replaced by the state of the wrapped
      transformation, with float32 values in place of the codes.

    Raises:
      ValueError: ``state`` contains no `CompressState`, or the codes were stored in
        other formats than ``fields`` says.

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

    The purpose is to continue an uncompressed run, or an imported state, with
    compression: give a fresh ``state`` from ``init``, and the state of the run as
    ``values``.

    Args:
      state: a `CompressState`, or any state that contains some.
      values: a state like ``decompress_state(state)``.

    Returns:
      A state like ``state``, with the contents of ``values``, rounded stochastically.

    Raises:
      ValueError: ``state`` contains no `CompressState`, or the codes were stored in
        other formats than ``fields`` says, or ``values`` differs from
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


def compressed_leaves(state: Any) -> Iterator[tuple[Any, str, Minifloat, jax.Array]]:
    """Path, field, format and values of every compressed array, as in step 0.

    The path is that in the inner state of its `CompressState`.

    Raises:
      ValueError: ``state`` contains no `CompressState`, or the codes were stored in
        other formats than ``fields`` says.
    """
    for compressed in _compressed_states(state):
        formats, codes = _formats(compressed), compressed.inner_state
        fields = _coded_fields(codes, formats)
        # Lowered levels are no further from the ends of the format than in step 0.
        values = _decode_fields(codes, fields, formats, 0, _check_codes(compressed))
        leaves = tree_leaves_with_path(values)
        for field, (path, value) in zip(fields, leaves, strict=True):
            if field is not None:
                yield path, field, formats[field], value


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


def _coded_fields(codes: PyTree, formats: Mapping[str, Minifloat]) -> list[str | None]:
    """The field of each leaf that holds codes."""

    def has_field(node: Any) -> bool:
        names = getattr(node, "_fields", getattr(node, "__dataclass_fields__", ()))
        return any(field in names for field in formats)

    # Nodes inside a field are of the parameters, and their attributes are no fields.
    opaque = set()
    for node in jax.tree.leaves(codes, is_leaf=has_field):
        for field in formats:
            opaque |= _node_types(jax.tree.structure(getattr(node, field, None)))
    return _fields(codes, formats, _has_codes, opaque - {tuple, list, dict})


def _nodes(inner_state: PyTree, opaque: Collection[type]) -> list[tuple[Any, Any]]:
    return tree_leaves_with_path(
        inner_state, is_leaf=lambda n: _is_compressed(n) or type(n) in opaque
    )


def _attributes(path: tuple[Any, ...]) -> list[str]:
    return [key.name for key in path if isinstance(key, GetAttrKey)]


def _encode_fields(
    values: PyTree,
    like: PyTree,
    fields: Sequence[str | None],
    formats: Mapping[str, Minifloat],
    step: ArrayLike,
    seed: jax.Array | None,
    intact: bool | jax.Array = True,
) -> PyTree:
    """The codes of the fields; other leaves get the dtypes of ``like``."""
    old_leaves, treedef = jax.tree.flatten(like)
    leaves = treedef.flatten_up_to(values)
    kinds = {
        i: (field, jnp.shape(leaf))
        for i, (field, leaf) in enumerate(zip(fields, leaves, strict=True))
        if field is not None
    }
    numbers = leaf_numbers(kinds, intact)
    for i, (leaf, old, field) in enumerate(
        zip(leaves, old_leaves, fields, strict=True)
    ):
        if field is None:
            leaves[i] = _narrow(leaf, old)
        else:
            leaves[i] = _encode(formats[field], leaf, step, numbers[i], seed)
    return treedef.unflatten(leaves)


def _decode_fields(
    codes: PyTree,
    fields: Sequence[str | None],
    formats: Mapping[str, Minifloat],
    step: ArrayLike,
    intact: bool | jax.Array,
) -> PyTree:
    """The values of the fields, NaN unless the codes are ``intact``."""
    leaves, treedef = jax.tree.flatten(codes)
    for i, (leaf, field) in enumerate(zip(leaves, fields, strict=True)):
        if field is not None:
            leaves[i] = _decode(formats[field], leaf, step, intact)
    return treedef.unflatten(leaves)


# Functions under `jax.jit` of their own, to be traced once per shape instead of once
# per leaf.
@functools.partial(jax.jit, static_argnums=0)
def _encode(
    format: Minifloat,
    x: jax.Array,
    step: ArrayLike,
    leaf: ArrayLike,
    seed: jax.Array | None,
) -> jax.Array:
    return format.encode(x, rounding_bits(x.shape, step, leaf, seed), step)


@functools.partial(jax.jit, static_argnums=0)
def _decode(
    format: Minifloat, code: jax.Array, step: ArrayLike, intact: bool | jax.Array
) -> jax.Array:
    return reject(format.decode(code, step), unless=intact)


def _decompress(node: Any) -> Any:
    if not _is_compressed(node):
        return node
    formats, codes = _formats(node), node.inner_state
    fields = _coded_fields(codes, formats)
    values = _decode_fields(
        codes, fields, formats, node.rounding_step, _check_codes(node)
    )
    return jax.tree.map(_decompress, values, is_leaf=_is_compressed)


def _recompress(node: Any, values: Any) -> Any:
    if not _is_compressed(node):
        return values
    _check_codes(node)
    formats, codes = _formats(node), node.inner_state
    fields = _coded_fields(codes, formats)
    values = jax.tree.map(_recompress, codes, values, is_leaf=_is_compressed)
    codes = _encode_fields(
        values, codes, fields, formats, node.rounding_step, node.rounding_seed
    )
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


def _names(state: CompressState) -> Any:
    """The fields with their formats; in states of version 0.1, in another place."""
    return state.formats if state.fields is None else state.fields


def _formats(state: CompressState) -> dict[str, Minifloat]:
    pairs = (name.split("=") for name in _names(state))
    return {field: Minifloat.from_name(format_name) for field, format_name in pairs}


def _description(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _check_codes(state: CompressState) -> bool | jax.Array:
    """Whether codes were stored in the formats that the state names, if known."""
    if state.fields is None:
        return True
    formats = _description(state.fields)
    return check_fingerprint("compress_state", state.formats, formats, _CONVERSION)


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


def _narrow(leaf: Any, like: Any) -> Any:
    """The inverse of `widen` on ``like``."""
    return leaf.astype(like.dtype) if is_half(like) else leaf


def _check_formats(formats: Mapping[str, Any]) -> None:
    if not formats:
        raise ValueError(
            "compress_state needs the format of at least one field, for example "
            "nu=UE6M2; got none."
        )
    bad = [
        f"{field}={format!r}"
        for field, format in formats.items()
        if not isinstance(format, Minifloat)
    ]
    if bad:
        raise TypeError(
            "compress_state needs a Minifloat for each field, for example nu=UE6M2; "
            f"got {', '.join(bad)}."
        )
    unsigned = [f for f in ("mu", "trace") if f in formats and not formats[f].signed]
    if unsigned:
        raise ValueError(
            f"the format of {' and '.join(unsigned)} must be signed, for example SE5M2 "
            "or SE8M7: an unsigned format makes negative numbers 0."
        )


def _check_fields(
    formats: Mapping[str, Minifloat],
    fields: Sequence[str | None],
    inner_state: PyTree,
    opaque: Collection[type],
) -> None:
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


def _check_state(state: Any, names: Mapping[str, None]) -> None:
    if not _is_compressed(state):
        raise TypeError(
            "compress_state needs the CompressState that its init returns, got "
            f"{type(state).__name__}; to compress the state of the wrapped "
            "transformation, use recompress_state(tx.init(params), state)."
        )
    if _names(state) != names:
        raise ValueError(
            f"the state has the formats {list(_names(state))}, but compress_state was "
            f"given {list(names)}; to convert the state, use "
            "recompress_state(tx.init(params), decompress_state(state))."
        )


def _check_values(values: Any, expected: Any) -> None:
    """Raise a ``ValueError`` naming every array that has another shape."""
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
