# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that survive a kill at any moment and tell when they are damaged.

Orbax writes a checkpoint under another name and renames it, so it appears whole, but
does not notice when its numbers are altered later. So the hashes of its files join
them: a checkpoint counts once they are there and for as long as they match.
"""

import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from flax.training.train_state import TrainState

History = list[dict[str, float]]  # the metrics of each epoch

# What Orbax logs about a damaged checkpoint, `restore` says in one line.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class SettingsError(Exception):
    """The run to resume was started with other settings."""


def open_folder(folder: Path) -> ocp.CheckpointManager:
    """The manager of the checkpoints in a folder, of which it keeps the last two."""
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
    state: TrainState,
    history: History,
    settings: dict[str, Any],
) -> None:
    """Writes the checkpoint of the last epoch in the history."""
    epoch = len(history)
    manager.save(
        epoch,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            run=ocp.args.JsonSave({"settings": settings, "history": history}),
        ),
    )
    folder = _folder(manager, epoch)
    write_json(_file_hashes(folder), folder / "hashes.json")


def restore(
    manager: ocp.CheckpointManager, state: TrainState, settings: dict[str, Any]
) -> tuple[TrainState, History]:
    """Reads the newest checkpoint that is intact and removes damaged newer ones.

    Args:
      manager: from `open_folder`.
      state: the initial state; what is returned, with no history, if none is intact.
      settings: must be those that the checkpoint was saved with.

    Raises:
      SettingsError: they are not; the message names those that differ.
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
        raise SettingsError(
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


def write_json(content: Any, path: Path) -> None:
    """Writes a file that is never seen half-written."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(unfinished, path)


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
