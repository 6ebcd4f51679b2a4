# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that survive a kill at any moment and tell when they are damaged.

Orbax writes a checkpoint under another name and renames the folder at the end, so that
no half-written checkpoint is seen. Numbers that are altered later go unnoticed, so that
the hashes of all files are saved beside them. A checkpoint is intact if the hashes are
there and match.
"""

import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from .command_line import InputError
from .results import write_json

History = list[dict[str, Any]]  # the metrics of each epoch

# `restore` reports a damaged checkpoint in one line; the log of Orbax has pages.
logging.getLogger("absl").setLevel(logging.CRITICAL)


def open_folder(folder: Path) -> ocp.CheckpointManager:
    """The manager of the checkpoints in a folder; the last two are kept."""
    return ocp.CheckpointManager(
        folder.absolute(),
        options=ocp.CheckpointManagerOptions(
            step_prefix="epoch",
            preservation_policy=ocp.checkpoint_managers.LatestN(2),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
        ),
    )


def save(
    manager: ocp.CheckpointManager,
    state: Any,
    history: History,
    settings: dict[str, Any],
) -> None:
    """Writes the checkpoint of the last epoch in the history.

    Raises:
      InputError: an array cannot be written, for example to a full disk.
      OSError: the folder cannot be written, for example because it is read-only.
    """
    epoch = len(history)
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        run=ocp.args.JsonSave({"settings": settings, "history": history}),
    )
    try:
        manager.save(epoch, args=args)
    except ValueError as error:  # of TensorStore, which writes the arrays for Orbax
        raise InputError(
            f"cannot write the checkpoint of epoch {epoch}: {error}"
        ) from error
    if jax.process_index() == 0:
        folder = _folder(manager, epoch)
        write_json(_file_hashes(folder), folder / "hashes.json")


def restore(
    manager: ocp.CheckpointManager, state: Any, settings: dict[str, Any]
) -> tuple[Any, History]:
    """Reads the newest checkpoint that is intact and removes damaged newer ones.

    Args:
      manager: from `open_folder`.
      state: the initial state, returned with an empty history if no checkpoint is
        intact.
      settings: must equal the settings that the checkpoint was saved with.

    Raises:
      InputError: a setting differs; the message names every such setting.
    """
    for epoch in sorted(manager.all_steps(), reverse=True):
        if _is_intact(_folder(manager, epoch)):
            break
        print(
            f"checkpoint of epoch {epoch} is incomplete or damaged and is not used",
            file=sys.stderr,
        )
        manager.delete(epoch)
    else:
        print("no checkpoint to resume from: starting anew", file=sys.stderr)
        return state, []

    run_args = ocp.args.Composite(run=ocp.args.JsonRestore())
    run = manager.restore(epoch, args=run_args)["run"]
    if run["settings"] != settings:
        raise InputError(
            "cannot resume with other settings: "
            + ", ".join(
                f"{name} was {run['settings'].get(name)}, not {value}"
                for name, value in settings.items()
                if run["settings"].get(name) != value
            )
        )
    state_args = ocp.args.Composite(state=ocp.args.StandardRestore(state))
    return manager.restore(epoch, args=state_args)["state"], run["history"]


def remove_all(manager: ocp.CheckpointManager) -> None:
    for epoch in manager.all_steps():
        manager.delete(epoch)


def _folder(manager: ocp.CheckpointManager, epoch: int) -> Path:
    return Path(manager.directory) / f"epoch_{epoch}"


def _file_hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def _is_intact(folder: Path) -> bool:
    try:
        hashes = json.loads((folder / "hashes.json").read_text())
        return hashes.items() <= _file_hashes(folder).items()
    except (OSError, ValueError, AttributeError):
        return False
