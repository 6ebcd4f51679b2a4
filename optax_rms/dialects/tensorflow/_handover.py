# SPDX-License-Identifier: Apache-2.0
"""Import and export of the optimizer states in TensorFlow's checkpoints and files."""

import collections
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_rms._scale_by_rms import ScaleByStddevState
from optax_rms._types import PyTree
from optax_rms.dialects._shared import chain_state, reading
from optax_rms.dialects._shared import slots as shared_slots
from optax_rms.dialects._shared.converter import Converter
from optax_rms.dialects._shared.plain_state import check_plain_state
from optax_rms.dialects._shared.problems import Problems
from optax_rms.dialects.keras import _handover as keras_handover
from optax_rms.dialects.keras import _optimizers as keras
from optax_rms.dialects.tensorflow import _saved as checkpoint
from optax_rms.dialects.tensorflow._optimizers import legacy_keras_rmsprop, rmsprop

# The field here that each of TensorFlow's slots belongs to.
_FIELDS = {"rms": "nu", "mg": "mu", "momentum": "trace"}

# Settings of tf.keras that do not change the numbers.
_WITHOUT_EFFECT = {"name", "jit_compile", "is_legacy_optimizer"}


def import_state(
    source: Mapping[str, Any] | str | os.PathLike[str],
    convert: Callable[[Mapping[str, Any]], PyTree],
    names: Sequence[str] | None = None,
    *,
    dialect: Callable[..., optax.GradientTransformation] | None = None,
    optimizer: str | None = None,
    step: int | None = None,
    **hyperparameters: Any,
) -> tuple[optax.GradientTransformation, Any]:
    """Continue in JAX a run of TensorFlow, from a checkpoint or file.

    The names of the arrays say which optimizer has written them, and where its slots
    are. With ``@`` for ``/.ATTRIBUTES/VARIABLE_VALUE``:

    * ``kernel/RMSProp``, ``kernel/RMSProp_1``: ``tf.compat.v1.train.Saver``, which
      numbers the slots: the mean square, the momentum; or, ``centered``, the mean
      square, the mean, the momentum. The rule is `rmsprop`.
    * ``kernel/.OPTIMIZER_SLOT/optimizer/rms@``, ``.../momentum@``, ``.../mg@``:
      ``tf.train.Checkpoint`` of TensorFlow 1's optimizer, or of tf.keras before 2.11 if
      there is ``optimizer/iter@`` as well. The rules are `rmsprop` and
      `legacy_keras_rmsprop`.
    * ``optimizer/_iterations@``, ``optimizer/_variables/1@``, ...:
      ``tf.train.Checkpoint`` of tf.keras from 2.11 on or of Keras 3. The rule is
      ``dialects.keras.rmsprop``.

    Args:
      source: one of these:

        * all of a checkpoint: a mapping from the names that
          ``tf.train.list_variables(path)`` lists to what
          ``tf.train.load_checkpoint(path).get_tensor(name)`` gives;
        * the path of a ``.h5`` file that ``model.save`` of tf.keras before 2.11 wrote.
          To read it, h5py must be installed. For files of later versions, use
          ``dialects.keras.import_state``.

      convert: the function that turns the trained variables of ``source``, under the
        same names, into the tree of the parameters. It may rename, transpose, reshape,
        split and join arrays, and must not change numbers. The names in a file are
        those of the variables, for example ``"dense/kernel"``.
      names: the variables that ``convert`` needs; variables without slots start fresh.
        ``None`` means all that have slots. Of tf.keras from 2.11 on and Keras 3, the
        trained variables in the order of ``model.trainable_variables``; ``None`` reads
        them from the object graph, the array ``_CHECKPOINTABLE_OBJECT_GRAPH``.
      dialect: `rmsprop`, `legacy_keras_rmsprop` or ``dialects.keras.rmsprop``. ``None``
        takes the rule of the optimizer that wrote ``source``.
      optimizer: the optimizer's name, ``"RMSProp"`` if not given to its constructor, or
        its path in ``tf.train.Checkpoint``. Only needed if there are several.
      step: the number of steps taken, for a learning rate that is a schedule. ``None``
        takes the number that is stored: ``global_step``, or Keras' own.
      **hyperparameters: the arguments of the dialect. Checkpoints hold none of them,
        except for those of tf.keras before 2.11, which hold all but ``epsilon``,
        ``centered``, the clipping, and a ``learning_rate`` that is a schedule; and for
        those of later Keras, which hold a ``learning_rate`` that is a number. A file
        holds all. Arguments given here replace stored ones.

    Returns:
      The transformation and its state.

    Raises:
      ValueError: anything is missing, left over, of another shape or dtype than its
        variable, not finite or negative, or the dialect is not that of the optimizer;
        everything found is in the message. Or ``convert`` does not just move elements.
      TypeError: ``hyperparameters`` are not those of the dialect.
      ImportError: h5py is missing.

    Example:
      >>> import numpy as np
      >>> from optax_rms import dialects
      >>> variables = {
      ...     "dense/kernel": np.zeros((2, 3), np.float32),
      ...     "dense/kernel/RMSProp": np.full((2, 3), 4.0, np.float32),
      ...     "dense/kernel/RMSProp_1": np.full((2, 3), 0.5, np.float32),
      ...     "global_step": np.array(1000),
      ... }
      >>> tx, state = dialects.tensorflow.import_state(
      ...     variables,
      ...     convert=lambda v: {"weight": v["dense/kernel"].T},
      ...     learning_rate=0.1,
      ...     momentum=0.9,
      ... )
      >>> print(state[0].nu["weight"].shape, state[2].trace["weight"][0, 0])
      (3, 2) -0.5
    """
    found = checkpoint.find_optimizer(source, optimizer)
    dialect = _choose_dialect(dialect, found)
    if dialect is keras.rmsprop:
        return _import_keras(found, convert, names, step, hyperparameters)
    return _import_slots(found, dialect, convert, names, step, hyperparameters)


def _choose_dialect(
    dialect: Callable[..., optax.GradientTransformation] | None,
    found: checkpoint.Optimizer,
) -> Callable[..., optax.GradientTransformation]:
    """The rule of the optimizer that has written a checkpoint."""
    allowed = {
        "unknown": {"rmsprop": rmsprop, "legacy_keras_rmsprop": legacy_keras_rmsprop},
        "legacy Keras": {"legacy_keras_rmsprop": legacy_keras_rmsprop},
        "new Keras": {"dialects.keras.rmsprop": keras.rmsprop},
    }[found.writer]
    if dialect is None:
        return next(iter(allowed.values()))
    if dialect not in allowed.values():
        versions = {
            "unknown": "of TensorFlow 1, or of tf.keras before 2.11",
            "legacy Keras": "of tf.keras before 2.11",
            "new Keras": "of tf.keras from 2.11 on, or of Keras 3",
        }[found.writer]
        raise ValueError(
            f"dialect must be {' or '.join(allowed)}, because {found.name} is an "
            f"optimizer {versions}, got {getattr(dialect, '__name__', dialect)!r} of "
            f"{getattr(dialect, '__module__', 'nowhere')}"
        )
    return dialect


def _import_slots(
    found: checkpoint.Optimizer,
    dialect: Callable[..., optax.GradientTransformation],
    convert: Callable[[Mapping[str, Any]], PyTree],
    names: Sequence[str] | None,
    step: int | None,
    hyperparameters: Mapping[str, Any],
) -> tuple[optax.GradientTransformation, Any]:
    """Import slots that stand beside their variables, by name."""
    problems = Problems("the variables cannot be imported")
    arguments = checkpoint.read_hyperparameters(problems, found, hyperparameters)
    problems.raise_any()
    tx = dialect(**arguments)
    # A scalar's state shows which slots there are, and what each of them starts from.
    fields = _fields(tx.init(jnp.zeros(())))
    fresh = _slots_of(fields, np.dtype(np.float32))
    if dialect is rmsprop:
        # There without momentum as well, where it holds the last step.
        fresh.setdefault("momentum", np.zeros(()))
    keys = found.slots("mg" in fresh)
    checkpoint.check_slots(problems, found, keys, fresh.keys())
    if "count" in fields:
        step = problems.attempt(checkpoint.read_step, found, step)
    names = list(keys) if names is None else list(names)
    for name in keys.keys() - set(names):
        problems.add(
            f"{name} has slots in the checkpoint, but is not among names; if they are "
            "those of another optimizer, leave them out of the variables"
        )
    # Not a dict, whose order is lost when it is flattened: convert may rely on it.
    likes = collections.OrderedDict(
        (name, problems.attempt(checkpoint.read_like, name, found.arrays))
        for name in names
    )
    problems.raise_any()

    def read(name: str, slot: str) -> np.ndarray:
        if name not in keys:
            return np.full_like(likes[name], fresh[slot])
        key, is_square = keys[name][slot], slot == "rms"
        return problems.attempt(
            reading.read_array,
            key,
            found.arrays[key],
            likes[name],
            nonnegative=is_square,
        )

    slots = {name: {slot: read(name, slot) for slot in fresh} for name in names}
    problems.raise_any()
    checkpoint.check_variances(problems, slots)
    problems.raise_any()
    converter = Converter("convert", convert, likes)
    columns = _by_field(
        {n: shared_slots.to_fields(arrays, _FIELDS) for n, arrays in slots.items()}
    )
    new = {field: converter(field, column) for field, column in columns.items()}
    if "count" in fields:
        new["count"] = np.array(step, np.int32)
    new = jax.tree.map(jnp.asarray, new)
    state = tx.init(new["mu" if "mu" in new else "nu"])
    return tx, chain_state.with_fields(state, new)


def _import_keras(
    found: checkpoint.Optimizer,
    convert: Callable[[Mapping[str, Any]], PyTree],
    names: Sequence[str] | None,
    step: int | None,
    hyperparameters: Mapping[str, Any],
) -> tuple[optax.GradientTransformation, keras.RMSpropState]:
    """Import the numbered variables of tf.keras from 2.11 on, or of Keras 3."""
    problems = Problems("the variables cannot be imported")
    saved = checkpoint.read_keras_variables(found)
    arguments = {k: v for k, v in hyperparameters.items() if k not in _WITHOUT_EFFECT}
    if "learning_rate" not in arguments:
        if saved.learning_rate is None:
            problems.add("learning_rate was a schedule, which is not stored; pass it")
        else:
            arguments["learning_rate"] = problems.attempt(
                reading.read_number,
                saved.learning_rate,
                found.arrays[saved.learning_rate],
            )
    if arguments.get("use_ema") and "ema_overwrite_frequency" not in arguments:
        problems.add(
            "ema_overwrite_frequency is not stored; pass it. The default of tf.keras "
            "is 100, that of Keras 3 None"
        )
    problems.raise_any()
    tx = keras.rmsprop(**arguments)
    weights = _keras_weights(problems, found, saved, names)
    fresh: Any = tx.init(jnp.zeros(()))
    config = _keras_config(fresh)
    _check_kinds(problems, saved, config)
    if step is None:
        count = found.arrays[saved.iteration]
    else:
        count = problems.attempt(reading.read_count, "step", step)
    problems.raise_any()
    numbered = _keras_mapping(found, saved) | {"0": np.asarray(count)}
    _, state = keras_handover.import_state(numbered, convert, weights, config=config)
    return tx, state


def export_state(
    state: Any,
    convert_back: Callable[[PyTree], Mapping[str, Any]],
    like: Mapping[str, Any] | str | os.PathLike[str],
    names: Sequence[str] | None = None,
    *,
    optimizer: str | None = None,
) -> dict[str, np.ndarray]:
    """Continue in TensorFlow a run of JAX: the inverse of `import_state`.

    An imported state is exported bit for bit. Centered, TensorFlow keeps the mean
    square instead of the variance; of a variance that is much smaller than the mean
    square, only the leading digits remain.

    Args:
      state: of `rmsprop`, `legacy_keras_rmsprop`, or an ``optax_rms.rmsprop`` with the
        learning rate inside the momentum and without bias correction; or of
        ``dialects.keras.rmsprop``, for tf.keras from 2.11 on and Keras 3.
      convert_back: the inverse of ``convert``: from the tree of the parameters to the
        arrays of the trained variables, under their names in ``like``.
      like: a checkpoint, or file, of the model and optimizer in TensorFlow, as for
        `import_state`, from which names, shapes and dtypes are taken. Any checkpoint of
        them will do, for example one from before the first step.
      names: as for `import_state`, of a state of ``dialects.keras.rmsprop``.
      optimizer: as for `import_state`.

    Returns:
      Arrays under the names that the slots have in ``like`` and, if the learning rate
      is a schedule or the state one of ``dialects.keras.rmsprop``, the number of steps
      under the name that it has there. Neither hyperparameters nor the variables of the
      model are among them. Of tf.keras from 2.11 on and Keras 3, they are in the order
      of ``optimizer.variables``, to which they can be assigned one by one.

    Raises:
      ValueError: TensorFlow has no such state, or anything is missing, left over, or of
        another shape or dtype than in ``like``; everything found is in the message. Or
        ``convert_back`` does not just move elements.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from optax_rms import dialects
      >>> tx = dialects.tensorflow.rmsprop(0.1, decay=0.5, momentum=0.9)
      >>> params = {"weight": jnp.zeros((3, 2))}
      >>> gradients = {"weight": jnp.full((3, 2), 2.0)}
      >>> _, state = tx.update(gradients, tx.init(params))
      >>> names = ("dense/kernel", "dense/kernel/RMSProp", "dense/kernel/RMSProp_1")
      >>> slots = dialects.tensorflow.export_state(
      ...     state,
      ...     convert_back=lambda tree: {"dense/kernel": tree["weight"].T},
      ...     like={name: np.zeros((2, 3), np.float32) for name in names},
      ... )
      >>> for name, slot in slots.items():
      ...     print(name, slot.shape, slot[0, 0].round(4))
      dense/kernel/RMSProp (2, 3) 2.5
      dense/kernel/RMSProp_1 (2, 3) 0.1265
    """
    check_plain_state("tensorflow.export_state", state)
    if isinstance(state, keras.RMSpropState):
        return _export_keras(state, convert_back, like, names, optimizer)
    return _export_slots(state, convert_back, like, optimizer)


def _export_slots(
    state: Any,
    convert_back: Callable[[PyTree], Mapping[str, Any]],
    like: Mapping[str, Any] | str | os.PathLike[str],
    optimizer: str | None,
) -> dict[str, np.ndarray]:
    """Export slots that stand beside their variables, by name."""
    fields = _fields(state)
    count = fields.pop("count", None)
    problems = Problems("the state cannot be exported")
    found = checkpoint.find_optimizer(like, optimizer)
    if found.writer == "new Keras":
        raise ValueError(
            f"{found.name} in like is an optimizer of tf.keras from 2.11 on, or of "
            "Keras 3, which can only continue a state of dialects.keras.rmsprop"
        )
    keys = found.slots("mu" in fields)
    if any("momentum" in slots for slots in keys.values()):
        # There without momentum as well, where it is multiplied by 0.
        square = fields.get("nu", fields.get("variance"))
        fields.setdefault("trace", jax.tree.map(np.zeros_like, square))
    expected = {slot for slot, field in _FIELDS.items() if field in fields} | {"rms"}
    checkpoint.check_slots(problems, found, keys, expected)
    problems.raise_any()
    template = jax.tree.map(jnp.asarray, next(iter(fields.values())))
    converter = Converter("convert_back", convert_back, template)
    columns = {field: converter(field, tree) for field, tree in fields.items()}
    _check_names(problems, next(iter(columns.values())), keys)
    problems.raise_any()
    result = {}
    for name, slots in keys.items():
        arrays = {field: column[name] for field, column in columns.items()}
        for slot, field in _FIELDS.items():
            array = arrays.get(field, arrays.get("variance"))
            if slot in slots:
                problems.attempt(checkpoint.check_like, slots[slot], found, array)
        dtype = np.asarray(found.arrays[slots["rms"]]).dtype
        for slot, array in _slots_of(arrays, dtype).items():
            result[slots[slot]] = array
    problems.raise_any()
    if count is not None and (step := found.step_name()) is not None:
        result[step] = count.astype(reading.to_numpy(found.arrays[step]).dtype)
    return {name: result[name] for name in found.arrays if name in result}


def _export_keras(
    state: keras.RMSpropState,
    convert_back: Callable[[PyTree], Mapping[str, Any]],
    like: Mapping[str, Any] | str | os.PathLike[str],
    names: Sequence[str] | None,
    optimizer: str | None,
) -> dict[str, np.ndarray]:
    """Export the numbered variables of tf.keras from 2.11 on, or of Keras 3."""
    found = checkpoint.find_optimizer(like, optimizer)
    if found.writer != "new Keras":
        raise ValueError(
            "like must have an optimizer of tf.keras from 2.11 on, or of Keras 3: no "
            "other can continue a state of dialects.keras.rmsprop"
        )
    problems = Problems("the state cannot be exported")
    saved = checkpoint.read_keras_variables(found)
    weights = _keras_weights(problems, found, saved, names)
    config = _keras_config(state)
    _check_kinds(problems, saved, config)
    problems.raise_any()
    numbered = keras_handover.export_state(
        state, convert_back, weights, like=_keras_mapping(found, saved), config=config
    )
    keys = [saved.iteration, saved.learning_rate or "", *saved.slots]
    arrays = dict(zip(keys, numbered.values(), strict=True))
    if not saved.is_numbered:
        del arrays[saved.learning_rate or ""]
    return arrays


def _keras_weights(
    problems: Problems,
    found: checkpoint.Optimizer,
    saved: checkpoint.KerasVariables,
    names: Sequence[str] | None,
) -> dict[str, Any]:
    """The trained variables by name, in the order of the optimizer."""
    known = saved.variables or names
    if known is None:
        problems.add(
            "names must be those of the trained variables, in the order of "
            "model.trainable_variables: the checkpoint has no object graph "
            "(_CHECKPOINTABLE_OBJECT_GRAPH), or several variables of the same name"
        )
        return {}
    given = known if names is None else list(names)
    if sorted(given) != sorted(known):
        problems.add(
            f"names must be the trained variables, {list(known)}, got {list(given)}"
        )
    return {
        name: problems.attempt(checkpoint.read_like, name, found.arrays)
        for name in known
    }


def _keras_config(state: keras.RMSpropState) -> dict[str, Any]:
    """Settings of Keras with which its optimizer has the variables of this state."""
    parameters = inspect.signature(keras.rmsprop).parameters
    config = {name: parameter.default for name, parameter in parameters.items()}
    del config["exclude_from_weight_decay"]
    fields = chain_state.fields(state.inner_state)
    return config | {
        "centered": "mu" in fields,
        "momentum": 0.5 if "trace" in fields else 0.0,
        "use_ema": state.average is not None,
        "gradient_accumulation_steps": None if state.accumulated is None else 2,
    }


def _check_kinds(
    problems: Problems, saved: checkpoint.KerasVariables, config: Mapping[str, Any]
) -> None:
    """The slots in a checkpoint must be those of the configuration."""
    uses = {
        "average": "use_ema",
        "gradient_accumulator": "gradient_accumulation_steps",
        "velocity": None,
        "momentum": "momentum",
        "average_gradient": "centered",
    }
    expected = [kind for kind, key in uses.items() if key is None or config[key]]
    if saved.kinds is not None and saved.kinds != expected:
        problems.add(
            f"the checkpoint has the slots {saved.kinds}, and the arguments need "
            f"{expected}; do use_ema, gradient_accumulation_steps, momentum and "
            "centered agree with the optimizer that has written the checkpoint?"
        )


def _keras_mapping(
    found: checkpoint.Optimizer, saved: checkpoint.KerasVariables
) -> dict[str, Any]:
    """The variables in the order of Keras 3, by number: the learning rate is second."""
    rate = found.arrays[saved.learning_rate] if saved.learning_rate else np.zeros(())
    values = [found.arrays[saved.iteration], rate]
    values += [found.arrays[name] for name in saved.slots]
    return {str(number): value for number, value in enumerate(values)}


def _fields(state: Any) -> dict[str, Any]:
    """The fields of a state that TensorFlow can have, in NumPy."""
    if not isinstance(state, tuple) or len(state) != 3:
        raise ValueError(
            "the state must be the tuple of three that rmsprop returns, got "
            f"{type(state).__name__}; take it out of the state of its chain"
        )
    rms = state[0]
    if not isinstance(rms, (optax.ScaleByRmsState, ScaleByStddevState)):
        raise ValueError(
            f"TensorFlow has nothing like {type(rms).__name__}; the state must be one "
            "of rmsprop, without bias correction"
        )
    if isinstance(rms, ScaleByStddevState) and rms.count is not None:
        raise ValueError("TensorFlow has no bias correction; train without")
    if isinstance(state[1], optax.TraceState):
        raise ValueError(
            "the momentum of this state leaves the learning rate out, as in PyTorch. "
            "TensorFlow's is a sum of past steps, each with the learning rate of its "
            "time, and those rates are not known. Export the state to PyTorch, or "
            "train with lr_in_momentum=True"
        )
    return jax.tree.map(reading.to_numpy, chain_state.fields(state))


def _slots_of(fields: Mapping[str, Any], dtype: np.dtype) -> dict[str, np.ndarray]:
    """TensorFlow's slots of one parameter, by its names."""
    fields = {field: array for field, array in fields.items() if field != "count"}
    return shared_slots.to_slots(fields, _FIELDS, dtype)


def _by_field(
    parameters: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, collections.OrderedDict[str, np.ndarray]]:
    """Arrays by field and name, from arrays by name and field."""
    fields = next(iter(parameters.values()), {})
    return {
        field: collections.OrderedDict(
            (name, arrays[field]) for name, arrays in parameters.items()
        )
        for field in fields
    }


def _check_names(problems: Problems, returned: Any, slots: Mapping[str, Any]) -> None:
    """The names that ``convert_back`` returned must be those of the checkpoint."""
    if not isinstance(returned, Mapping):
        problems.add(
            "convert_back must return a mapping from the names of variables to arrays, "
            f"got {type(returned).__name__}"
        )
        return
    for name in sorted(slots.keys() - returned.keys()):
        problems.add(f"{name} has slots in like, but convert_back does not return it")
    for name in sorted(returned.keys() - slots.keys()):
        problems.add(f"{name} comes from convert_back, but has no slots in like")
