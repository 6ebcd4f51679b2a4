# SPDX-License-Identifier: Apache-2.0
"""Training in epochs, each saved, so that a run that was killed can be continued."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from . import checkpoints
from .command_line import InputError


def train(
    epoch: Callable[[Any], tuple[Any, dict[str, Any]]],
    state: Any,
    num_epochs: int,
    output: Path,
    settings: dict[str, Any],
    *,
    resume: bool,
    summary: Callable[[dict[str, Any]], dict[str, float]] = dict,
) -> tuple[Any, checkpoints.History]:
    """Trains with a progress bar and a checkpoint of each epoch.

    Args:
      epoch: trains for one epoch; returns the new state and the metrics, scalars or
        arrays.
      state: the tree of arrays to start from.
      num_epochs: of the whole run, epochs before an interruption included.
      output: folder of the run. Without ``resume``, its checkpoints and results.json
        are removed.
      settings: of the run, saved as JSON. A run resumes with equal settings only.
      resume: whether to go on from the newest intact checkpoint.
      summary: the numbers for the progress bar, from the metrics of an epoch.

    Returns:
      The last state, and the metrics of every epoch since the start of the run.

    Raises:
      InputError: a loss is no longer finite, the settings differ, or the run has more
        epochs already.
    """
    history: checkpoints.History = []
    with checkpoints.open_folder(output / "checkpoints") as manager:
        if resume:
            state, history = checkpoints.restore(manager, state, settings)
        else:
            checkpoints.remove_all(manager)
            (output / "results.json").unlink(missing_ok=True)
        if len(history) > num_epochs:
            raise InputError(
                f"--epochs {num_epochs} is less than the {len(history)} that the run "
                f"in {output} already has"
            )
        with tqdm(
            total=num_epochs,
            initial=len(history),
            disable=jax.process_index() > 0,
            bar_format="{l_bar}{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]",
        ) as progress:
            while len(history) < num_epochs:
                state, metrics = epoch(state)
                history.append({k: np.asarray(v).tolist() for k, v in metrics.items()})
                if not all(np.isfinite(x).all() for x in history[-1].values()):
                    raise InputError(
                        f"the loss is no longer finite in epoch {len(history)}; "
                        "try a lower --learning-rate"
                    )
                checkpoints.save(manager, state, history, settings)
                progress.set_postfix(summary(history[-1]), refresh=False)
                progress.update()
    return state, history
