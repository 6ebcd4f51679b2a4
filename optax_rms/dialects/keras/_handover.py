# SPDX-License-Identifier: Apache-2.0
"""Import and export of the state of RMSProp from and to Keras."""

import collections
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_rms import _checks as checks
from optax_rms._types import PyTree
from optax_rms.dialects._shared import chain_state, reading, slots
from optax_rms.dialects._shared.converter import Converter
from optax_rms.dialects._shared.plain_state import check_plain_state
from optax_rms.dialects._shared.problems import Problems
from optax_rms.dialects.keras import _saved as variables
from optax_rms.dialects.keras._optimizers import LearningRate
from optax_rms.dialects.keras._optimizers import RMSpropState as RMSpropState
from optax_rms.dialects.keras._optimizers import rmsprop as rmsprop

# Keras' slots, as fields of the state of `optax_rms.rmsprop`.
_FIELDS = {"velocity": "nu", "momentum": "trace", "average_gradient": "mu"}


def import_state(
    source: Any,
    convert: Callable[[Any], PyTree],
    names: variables.Names | None = None,
    learning_rate: LearningRate | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    exclude_from_weight_decay: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> tuple[optax.GradientTransformationExtraArgs, RMSpropState]:
    """Continue a run of ``keras.optimizers.RMSprop`` of Keras 3 or tf.keras >= 2.11.

    Args:
      source: one of the following. Keras and TensorFlow need not be installed.

        * The path of a file of ``model.save``, ``"model.keras"`` or ``"model.h5"``.
        * The path of a file of ``model.save_weights``, ``"model.weights.h5"``, with
          ``config``.
        * The optimizer, built, on any backend, for example ``model.optimizer``.
        * A list of variables or arrays, for example ``optimizer.variables``, or a
          mapping from ``"0"``, ``"1"``, ... to arrays, for example the result of
          `export_state`; both with ``config``.

        Of a ``LossScaleOptimizer``, as models of the policy ``mixed_float16`` have, the
        inner optimizer is imported; scales of losses are not. Reading files needs h5py.
      convert: the function that turns the weights of the model into the tree of
        parameters here. It is called with the slots of the optimizer in place of the
        weights, as ``{name: array}`` with NumPy arrays; arrays of half precision are
        widened to float32. It may rename, transpose, reshape, split and join arrays,
        but not scale, pad, drop or round them.
      names: names of the trainable variables in the order of the model,
        ``[v.path for v in model.trainable_variables]``; or a mapping from the names to
        the weights, in this order, with which all shapes are checked. ``convert`` is
        given these names. Files in which Keras stores arrays by position (``.keras``,
        ``.weights.h5``) need them. Optimizers and ``.h5`` files have names, in Keras 3
        with underscores in place of slashes.
      learning_rate: a number, array, or schedule in place of the learning rate of
        Keras. A schedule starts from the number of calls that the optimizer has seen,
        for example from 1000 after 1000 batches. Needed where Keras has a schedule of a
        class of yours.
      config: the result of ``optimizer.get_config()``, in place of the configuration in
        ``source``.
      exclude_from_weight_decay: as for `rmsprop`. By default the parameters that an
        optimizer excludes stay excluded; files and lists of variables do not hold them.

    Returns:
      The transformation `rmsprop`, and its state, which continue the run.

    Raises:
      ValueError: ``source`` cannot be imported. The message names everything that is
        missing, left over, of a wrong shape or dtype, out of range or not finite, or
        all arrays that ``convert`` does not just move.
      ImportError: h5py is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from optax_rms import dialects
      >>> config = {  # optimizer.get_config()
      ...     **dict(learning_rate=0.1, rho=0.9, momentum=0.0, epsilon=0.0),
      ...     **dict(centered=False, weight_decay=None, clipnorm=None, clipvalue=None),
      ...     **dict(global_clipnorm=None, use_ema=False, ema_momentum=0.99),
      ...     **dict(ema_overwrite_frequency=None),
      ... }
      >>> velocity = np.full((2, 3), 4.0, np.float32)
      >>> variables = [np.array(25), np.array(0.1), velocity]
      >>> def convert(arrays):
      ...     return {"weight": jnp.asarray(arrays["kernel"]).T}
      >>> tx, state = dialects.keras.import_state(
      ...     variables, convert, ["kernel"], config=config
      ... )

      Keras' velocity is the mean square. It is 4, so a gradient of 2 moves a parameter
      by the learning rate:

      >>> updates, state = tx.update({"weight": jnp.full((3, 2), 2.0)}, state)
      >>> print(updates["weight"][0])
      [-0.1 -0.1]

      Back in Keras, one step later:

      >>> def convert_back(params):
      ...     return {"kernel": params["weight"].T}
      >>> exported = dialects.keras.export_state(
      ...     state, convert_back, ["kernel"], like=variables, config=config
      ... )
      >>> print(exported["0"], exported["2"].shape)
      26 (2, 3)
    """
    saved = variables.read(source, names, config, learning_rate)
    problems = Problems("the Keras optimizer cannot be imported")
    count = problems.attempt(
        reading.read_count, "iteration", saved.scalars["iteration"]
    )
    settings = dict(saved.settings)
    if "learning_rate" in saved.scalars:
        stored = saved.scalars["learning_rate"]
        rate = problems.attempt(reading.read_number, "learning_rate", stored)
        settings.setdefault("learning_rate", rate)
    weights = dict(names) if isinstance(names, Mapping) else {}
    arrays = {
        slot: {
            name: problems.attempt(_read, slot, name, value, weights)
            for name, value in column.items()
        }
        for slot, column in saved.slots.items()
    }
    problems.raise_any()

    converter = Converter("convert", convert, _named(arrays["velocity"]))
    fields = {
        name: slots.to_fields({slot: arrays[slot][name] for slot in arrays}, _FIELDS)
        for name in saved.names
    }
    trees = {}
    for field in fields[saved.names[0]]:
        column = _named({name: own[field] for name, own in fields.items()})
        moved = converter(slots.slot_of(field, _FIELDS), column)
        trees[field] = jax.tree.map(jnp.array, moved)
    if exclude_from_weight_decay is not None:
        settings["exclude_from_weight_decay"] = exclude_from_weight_decay
    elif saved.excluded:
        settings["exclude_from_weight_decay"] = _mask(converter, saved)
    tx = problems.attempt(rmsprop, **settings)
    problems.raise_any()

    # init looks at nothing but the shapes of the parameters.
    state = tx.init(trees["variance" if "variance" in trees else "nu"])
    return tx, RMSpropState(
        count=jnp.asarray(count, jnp.int32),
        accumulated=trees.get("gradient_accumulator"),
        inner_state=chain_state.with_fields(state.inner_state, trees),
        average=trees.get("average"),
    )


def export_state(
    state: RMSpropState,
    convert_back: Callable[[PyTree], Mapping[str, Any]],
    names: variables.Names | None = None,
    *,
    like: Any,
    config: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """The inverse of `import_state`: continue in Keras a run of JAX.

    The result is for ``load_own_variables`` of the optimizer, which must be built; of a
    ``LossScaleOptimizer``, for that of its ``inner_optimizer``. All settings, the
    learning rate included, are as in ``like``.

    Args:
      state: of `rmsprop`, for example from `import_state`.
      convert_back: the inverse of the ``convert`` of `import_state`: a function from a
        tree of parameters to ``{name: array}``.
      names: as for `import_state`.
      like: the optimizer that continues the run, or any other ``source`` of
        `import_state`, for the order, shapes and dtypes of the variables.
      config: as for `import_state`.

    Returns:
      A mapping from ``"0"``, ``"1"``, ... to NumPy arrays, in the order of the
      optimizer's variables.

    Raises:
      ValueError: the state does not fit ``like``, or ``convert_back`` does not just
        move elements; everything found is in the message.
      TypeError: the state belongs to another transformation.
    """
    check_plain_state("keras.export_state", state)
    checks.check_state_class("keras.export_state", state, RMSpropState)
    # The learning rate stays as in like, so that any number serves to read it.
    saved = variables.read(like, names, config, learning_rate=0.0)
    fields = chain_state.fields(state.inner_state) | {
        "average": state.average,
        "gradient_accumulator": state.accumulated,
    }
    trees = {
        slots.slot_of(field, _FIELDS): (field, tree)
        for field, tree in fields.items()
        if tree is not None
    }
    problems = Problems("the state cannot be exported")
    if trees.keys() != saved.slots.keys():
        problems.add(f"like has the slots {[*saved.slots]}, the state {[*trees]}")
    problems.raise_any()

    converter = Converter("convert_back", convert_back, trees["velocity"][1])
    columns = {field: converter(slot, tree) for slot, (field, tree) in trees.items()}
    returned = columns[trees["velocity"][0]]
    for name in sorted(returned.keys() ^ set(saved.names)):
        is_missing = name in saved.names
        where = "like" if is_missing else "the result of convert_back"
        problems.add(f"{name!r} is only in {where}")
    problems.raise_any()
    arrays = {name: _write(problems, name, columns, saved) for name in saved.names}
    problems.raise_any()
    scalars = {name: np.asarray(value) for name, value in saved.scalars.items()}
    scalars["iteration"] = np.asarray(state.count, scalars["iteration"].dtype)
    flat = [*scalars.values()]
    flat += [arrays[name][slot] for slot in saved.slots for name in saved.names]
    return {str(i): array for i, array in enumerate(flat)}


def _named(arrays: dict[str, Any]) -> collections.OrderedDict[str, Any]:
    # Not a dict, whose order is lost when it is flattened: convert may rely on it.
    return collections.OrderedDict(arrays)


def _read(slot: str, name: str, value: Any, weights: dict[str, Any]) -> np.ndarray:
    """Read a slot of a parameter; all slots of one must be alike.

    The first slot becomes the template in ``weights``, if the user gave no weight.
    """
    array = reading.read_array(
        f"{name}_{slot}", value, weights.get(name), nonnegative=slot == "velocity"
    )
    if np.iscomplexobj(array):
        raise ValueError(
            f"{name}_{slot} is complex; Keras squares complex gradients without taking "
            "their modulus, so that its velocity is of no use here"
        )
    weights.setdefault(name, array)
    return array


def _mask(converter: Converter, saved: variables.Saved) -> PyTree:
    """Which leaves come from excluded parameters."""
    flags = [name in saved.excluded for name in saved.names]
    found = [{flags[i] for i in sources} for sources in converter.sources]
    if any(len(kinds) > 1 for kinds in found):
        raise ValueError(
            f"convert must not join {sorted(saved.excluded)}, which the optimizer "
            "excludes from weight decay, with others"
        )
    return jax.tree.unflatten(converter.treedef, [True in kinds for kinds in found])


def _write(
    problems: Problems,
    name: str,
    columns: Mapping[str, Mapping[str, np.ndarray]],
    saved: variables.Saved,
) -> dict[str, np.ndarray]:
    """The slots of a parameter, in Keras' shapes and dtypes; ``columns`` by field."""
    fields = {field: column[name] for field, column in columns.items()}
    shape = np.shape(saved.slots["velocity"][name])
    wrong = [
        f"{name}_{slots.slot_of(field, _FIELDS)} must have shape {shape} as in like, "
        f"but convert_back returned {array.shape}"
        for field, array in fields.items()
        if array.shape != shape
    ]
    if wrong:
        for line in wrong:
            problems.add(line)
        return {}
    dtype = np.asarray(saved.slots["velocity"][name]).dtype
    arrays = slots.to_slots(fields, _FIELDS, dtype)
    for slot, array in arrays.items():
        if not np.all(np.isfinite(array)):
            problems.add(f"{name}_{slot} is not finite, as {dtype}")
    return arrays
