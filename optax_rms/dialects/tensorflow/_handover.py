# SPDX-License-Identifier: Apache-2.0
"""RMSProp as TensorFlow has it, and runs handed over from and to its checkpoints."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_rms._scale_by_rms import ScaleByStddevState
from optax_rms._types import PyTree
from optax_rms.dialects._shared import chain_state, reading, variances
from optax_rms.dialects._shared.converter import Converter
from optax_rms.dialects._shared.plain_state import check_plain_state
from optax_rms.dialects._shared.problems import Problems
from optax_rms.dialects.tensorflow import _saved as checkpoint
from optax_rms.dialects.tensorflow._optimizers import (
    legacy_keras_rmsprop as legacy_keras_rmsprop,
)
from optax_rms.dialects.tensorflow._optimizers import rmsprop as rmsprop


def import_state(
    variables: Mapping[str, Any],
    convert: Callable[[Mapping[str, Any]], PyTree],
    names: Sequence[str] | None = None,
    *,
    dialect: Callable[..., optax.GradientTransformation] = rmsprop,
    optimizer: str | None = None,
    step: int | None = None,
    **hyperparameters: Any,
) -> tuple[optax.GradientTransformation, Any]:
    """Continue in JAX what TensorFlow has begun, from a checkpoint.

    Slots are found by the names that TensorFlow gives them. A checkpoint of
    ``tf.compat.v1.train.Saver`` has, beside each variable, ``/RMSProp`` for the mean
    square, then ``/RMSProp_1`` for the momentum or, ``centered``, ``/RMSProp_1`` for
    the mean and ``/RMSProp_2`` for the momentum. One of ``tf.train.Checkpoint`` has
    ``/.OPTIMIZER_SLOT/optimizer/rms/...``, ``.../momentum/...`` and ``.../mg/...``.

    Args:
      variables: all of the checkpoint: the arrays that
        ``tf.train.load_checkpoint(path).get_tensor(name)`` gives, by the names that
        ``tf.train.list_variables(path)`` lists.
      convert: the function that turns the trained variables of ``variables``, under the
        same names, into the tree of the parameters. It may rename, transpose, reshape,
        split and join arrays, and must not change numbers.
      names: which variables ``convert`` needs; those without slots start fresh. If
        ``None``, all that have slots.
      dialect: `rmsprop` or `legacy_keras_rmsprop`, whichever wrote the checkpoint.
      optimizer: the optimizer's name, ``"RMSProp"`` if not given to its constructor, or
        its path in ``tf.train.Checkpoint``, which is only needed if there are several.
      step: the number of steps taken, for a learning rate that is a schedule. ``None``
        takes it from the checkpoint's ``global_step`` or, of legacy Keras, ``iter``.
      **hyperparameters: the arguments of ``dialect``. Checkpoints hold none of them,
        except that of legacy Keras, which holds all but ``epsilon``, ``centered``, the
        clipping, and a ``learning_rate`` that is a schedule.

    Returns:
      The transformation and its state.

    Raises:
      ValueError: anything is missing, left over, of another shape or dtype than its
        variable, not finite or negative; everything found is in the message. Or
        ``convert`` does not just move elements.
      TypeError: ``hyperparameters`` are not those of ``dialect``.

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
    found = checkpoint.find_optimizer(variables, optimizer)
    problems = Problems("the variables cannot be imported")
    if dialect is legacy_keras_rmsprop:
        stored = checkpoint.read_hyperparameters(problems, variables, found)
        hyperparameters = stored | hyperparameters
        if "learning_rate" not in hyperparameters:
            problems.add("learning_rate was a schedule, which is not stored; pass it")
        problems.raise_any()
    tx = dialect(**hyperparameters)
    fields = _fields(tx.init(jnp.zeros(())))
    fresh = _to_slots(fields)
    if dialect is not legacy_keras_rmsprop:
        # There without momentum as well, when it is the last step.
        fresh.setdefault("momentum", np.zeros(()))
    slots = found.slots(variables, "mg" in fresh)
    checkpoint.check_slots(problems, found, slots, fresh.keys())
    if "count" in fields:
        step = problems.attempt(checkpoint.read_step, variables, found, step)
    names = list(slots) if names is None else list(names)
    for name in slots.keys() - set(names):
        problems.add(
            f"{name} has slots in the checkpoint, but is not among names; if they are "
            "those of another optimizer, leave them out of the variables"
        )
    likes = collections.OrderedDict(
        (name, problems.attempt(checkpoint.read_like, name, variables))
        for name in names
    )
    problems.raise_any()

    def read(name, slot):
        like = likes[name]
        if name not in slots:
            return np.full_like(like, fresh[slot])
        key = slots[name][slot]
        return problems.attempt(
            reading.read_array, key, variables[key], like, nonnegative=slot == "rms"
        )

    arrays = {
        slot: collections.OrderedDict((name, read(name, slot)) for name in names)
        for slot in fresh
    }
    problems.raise_any()
    if "mg" in arrays:
        checkpoint.check_variances(problems, arrays["rms"], arrays["mg"])
    problems.raise_any()
    convert_slot = Converter("convert", convert, likes)
    new = _to_fields({slot: convert_slot(slot, tree) for slot, tree in arrays.items()})
    if "count" in fields:
        new["count"] = np.array(step, np.int32)
    new = jax.tree.map(jnp.asarray, new)
    state = tx.init(new["mu" if "mu" in new else "nu"])
    return tx, chain_state.with_fields(state, new)


def export_state(
    state: Any,
    convert_back: Callable[[PyTree], Mapping[str, Any]],
    like: Mapping[str, Any],
    *,
    optimizer: str | None = None,
) -> dict[str, np.ndarray]:
    """The inverse of `import_state`: continue in TensorFlow what JAX has begun.

    It is exact, bit for bit, for what was imported. Centered, TensorFlow keeps the mean
    square instead of the variance, of which only the leading digits remain where it is
    the much smaller of the two.

    Args:
      state: of `rmsprop`, `legacy_keras_rmsprop`, or an ``optax_rms.rmsprop`` with the
        learning rate inside the momentum and without bias correction.
      convert_back: the inverse of ``convert``: from the tree of the parameters to the
        arrays of the trained variables, under their names in ``like``.
      like: all variables of a checkpoint of the model and optimizer in TensorFlow, for
        their names, shapes and dtypes. Any checkpoint of them will do.
      optimizer: as for `import_state`.

    Returns:
      Arrays under the names that the slots have in ``like``, and, if the learning rate
      is a schedule, the number of steps under the name that it has there. It has
      neither the hyperparameters nor the variables themselves.

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
    fields = _fields(state)
    problems = Problems("the state cannot be exported")
    found = checkpoint.find_optimizer(like, optimizer)
    trees = _to_slots(fields)
    slots = found.slots(like, "mg" in trees)
    if any("momentum" in names for names in slots.values()):
        # There without momentum as well, when it is multiplied by 0.
        trees.setdefault("momentum", jax.tree.map(np.zeros_like, trees["rms"]))
    checkpoint.check_slots(problems, found, slots, trees.keys())
    problems.raise_any()
    template = jax.tree.map(jnp.asarray, trees["rms"])
    convert_slot = Converter("convert_back", convert_back, template)
    columns = {slot: convert_slot(slot, tree) for slot, tree in trees.items()}
    _check_names(problems, columns["rms"], slots)
    problems.raise_any()
    result = {
        slots[name][slot]: problems.attempt(
            checkpoint.write_slot, slots[name][slot], like, array
        )
        for slot, column in columns.items()
        for name, array in column.items()
    }
    problems.raise_any()
    step = checkpoint.step_name(like, found)
    if "count" in fields and step is not None:
        result[step] = fields["count"].astype(reading.to_numpy(like[step]).dtype)
    return result


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
            "time, and those rates are not known. Hand the state over to PyTorch, or "
            "train with lr_in_momentum=True"
        )
    return jax.tree.map(reading.to_numpy, chain_state.fields(state))


def _to_slots(fields: dict[str, Any]) -> dict[str, Any]:
    """Trees of TensorFlow's slots, by its names."""
    if "variance" in fields:
        mean, variance = fields["mu"], fields["variance"]
        squares = jax.tree.map(variances.mean_square, variance, mean)
        slots = {"rms": squares, "mg": mean}
    else:
        slots = {"rms": fields["nu"]}
    if "trace" in fields:
        slots["momentum"] = jax.tree.map(np.negative, fields["trace"])
    return slots


def _to_fields(slots: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_to_slots`."""
    if "mg" in slots:
        variance = jax.tree.map(variances.variance, slots["rms"], slots["mg"])
        fields = {"mu": slots["mg"], "variance": variance}
    else:
        fields = {"nu": slots["rms"]}
    if "momentum" in slots:
        fields["trace"] = jax.tree.map(np.negative, slots["momentum"])
    return fields


def _check_names(problems, returned: Any, slots: Mapping[str, Any]) -> None:
    """What ``convert_back`` returned must have the names of the checkpoint."""
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
