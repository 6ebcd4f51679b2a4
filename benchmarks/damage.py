# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints, checkpoints of other runs, full disks and read-only folders."""

import collections
import contextlib
import hashlib
import io
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

import optax_rms
from benchmarks import small_run
from benchmarks.kills import Runs
from examples.common import checkpoints, results

# The files of smaller arrays have checksums, and Orbax alone notices any damage.
WIDTH = 64


class OldCompressState(NamedTuple):
    """The layout of `CompressState` in version 0.1."""

    rounding_step: jax.Array
    fields: dict[str, None]
    inner_state: Any


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def truncate(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def flip_a_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def measure_damage(count: int, folder: Path, progress: Any) -> dict[str, Any]:
    """Random damage to a file of the newest of two checkpoints.

    Returns:
      For each kind of damage, the cases; those in which the checkpoint before it was
      restored to the bit, with a message; and, of Orbax without the hashes of the
      examples, how often it raised, restored the same bits, or restored other bits.
    """
    first, second = _saved(folder / "saved")
    rng, template = random.Random(0), jax.tree.map(jnp.zeros_like, first)
    counts: dict[str, collections.Counter] = {}
    for i in progress(range(count)):
        kind = (delete, truncate, flip_a_bit)[i % 3]
        copy = shutil.copytree(folder / "saved", folder / "damaged")
        newest = copy / "epoch_2"
        files = sorted(path for path in newest.rglob("*") if path.stat().st_size)
        kind(rng.choice([path for path in files if path.is_file()]), rng)
        row = counts.setdefault(kind.__name__, collections.Counter(cases=0))
        row["cases"] += 1
        row[f"orbax_{_of_orbax(newest, template, second)}"] += 1
        with (
            contextlib.redirect_stderr(io.StringIO()) as messages,
            checkpoints.open_folder(copy) as manager,
        ):
            state, history = checkpoints.restore(manager, template, small_run.SETTINGS)
        row["previous_restored"] += (
            # Tasks that Orbax left behind above may write there as well.
            "checkpoint of epoch 2 is incomplete or damaged and is not used\n"
            in messages.getvalue()
            and len(history) == 1
            and results.sha256(state) == results.sha256(first)
        )
        shutil.rmtree(copy)
    return {kind: dict(row) for kind, row in counts.items()}


def _of_orbax(checkpoint: Path, template: Any, saved: Any) -> str:
    """What Orbax alone restores from a damaged checkpoint."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.restore((checkpoint / "state").absolute(), template)
    except Exception:
        return "raised"
    same = results.sha256(found) == results.sha256(saved)
    return "restored" if same else "restored_other_bits"


def _saved(folder: Path) -> tuple[Any, Any]:
    """Two checkpoints of two states."""
    state = small_run.create(small_run.optimizer(), WIDTH)
    state = jax.tree.map(jnp.asarray, state)
    states = []
    with checkpoints.open_folder(folder) as manager:
        for epoch in (1, 2):
            gradients = jax.tree.map(jnp.ones_like, state.params)
            state = state.apply_gradients(grads=gradients)
            history = epoch * [{"loss": 1.0}]
            checkpoints.save(manager, state, history, small_run.SETTINGS)
            states.append(state)
    return states[0], states[1]


def others() -> dict[str, Any]:
    """States into which the checkpoint of the small run must not be restored."""
    formats = {"nu": optax_rms.UE6M2, "trace": optax_rms.SE5M2}
    momentum = optax_rms.rmsprop(1e-3, momentum=0.9)
    compress = optax_rms.compress_state

    def of(tx: Any, width: int = WIDTH) -> Any:
        return small_run.create(tx, width)

    other_window = formats["nu"].for_eps(1e-8)
    old = of(small_run.optimizer())
    step, _, inner, fields, _ = old.opt_state
    return {
        "wider model": of(small_run.optimizer(), 2 * WIDTH),
        "optimizer without momentum": of(
            compress(optax_rms.rmsprop(1e-3), nu=formats["nu"])
        ),
        "centered optimizer": of(
            compress(
                optax_rms.rmsprop(1e-3, momentum=0.9, centered=True),
                variance=formats["nu"],
                trace=formats["trace"],
            )
        ),
        "no storage format": of(momentum),
        "two bytes": of(compress(momentum, nu=optax_rms.UE8M8, trace=formats["trace"])),
        "other window": of(compress(momentum, nu=other_window, trace=formats["trace"])),
        "version 0.1": old.replace(opt_state=OldCompressState(step, fields, inner)),
    }


def measure_others(folder: Path) -> list[dict[str, Any]]:
    """Checkpoints of one run restored into the state of another, in both directions."""
    own = small_run.create(small_run.optimizer(), WIDTH)
    rows = []
    for name, other in others().items():
        for direction, saved, template in (
            ("from", other, own),
            ("into", own, other),
        ):
            path = folder / f"{direction} {name}"
            with checkpoints.open_folder(path) as manager:
                checkpoints.save(manager, saved, [{}], small_run.SETTINGS)
                before = _contents(path)
                try:
                    checkpoints.restore(manager, template, small_run.SETTINGS)
                    message = None
                except Exception as error:
                    message = f"{type(error).__name__}: {error}"
                rows.append(
                    {
                        "checkpoint": f"{direction} {name}",
                        "refused": message is not None,
                        "unchanged": _contents(path) == before,
                        "message": message and message[:300],
                    }
                )
    return rows


def measure_no_space(folder: Path, num_epochs: int) -> list[dict[str, Any]]:
    """Runs that cannot write, and end with the bits of any other once they can."""
    runs = Runs(num_epochs)
    reference = runs.finish(folder / "reference")
    begun = Runs(num_epochs // 2)
    rows = []
    for name, prevent in (("full disk", full_disk), ("read-only folder", read_only)):
        run = folder / name
        begun.finish(run)
        (run / "end.json").unlink()
        kept = _contents(run / "checkpoints")
        with prevent(run) as limit:
            process = runs.start(run, limit)
            process.join()
        after = _contents(run / "checkpoints")
        rows.append(
            {
                "obstacle": name,
                "exit_code": process.exitcode,
                "message": _last_line(small_run.messages_of(run), run),
                "checkpoints_kept": kept.items() <= after.items(),
                "same_end_later": runs.finish(run) == reference,
            }
        )
    return rows


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[int]:
    """A limit for the size of each file, in bytes; no privilege is needed."""
    del folder
    yield 8192


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The rights of files do not bind the superuser, whose folder is mounted anew."""
    if os.geteuid():
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
    else:
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield
        subprocess.run(["umount", folder], check=True)


def _contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _last_line(path: Path, folder: Path) -> str:
    """With paths relative to the folder."""
    return path.read_text().splitlines()[-1].replace(f"{folder}/", "")
