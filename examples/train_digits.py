# SPDX-License-Identifier: Apache-2.0
"""Trains a small network to read handwritten digits with RMSProp.

    python examples/train_digits.py
    python examples/train_digits.py --learning-rate 0.002 --momentum 0.5 --centered
    python examples/train_digits.py --data mnist.npz --output runs/mnist
    python examples/train_digits.py --resume --epochs 20

The digits are scikit-learn's, of 8x8 pixels, or MNIST from a file in Keras' layout. The
network has one layer of 128 units; 20 % of the training examples are held out for
validation. The output folder receives curves.png, results.json and a checkpoint per
epoch. A run that is killed, at whatever moment, and continued with --resume ends, on a
CPU, with the same bits as one that was not.
"""

import argparse
import hashlib
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import checkpoints
import command_line
import digits
import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

import optax_rms

PACKAGES = ("optax-rms", "jax", "jaxlib", "optax", "flax", "orbax-checkpoint", "numpy")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    try:
        train(parser.parse_args(argv))
    except (digits.InputError, checkpoints.SettingsError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted; --resume continues this run\n")


def train(args: argparse.Namespace) -> None:
    examples = digits.load(args.data)
    training, validation, *test = digits.prepare(*examples, seed=args.seed)
    if args.batch_size > len(training.labels):
        raise digits.InputError(
            f"--batch-size {args.batch_size} is more than the {len(training.labels)} "
            "training examples"
        )

    optimizer = optax_rms.rmsprop(
        args.learning_rate, centered=args.centered, momentum=args.momentum or None
    )
    init_key, shuffle_key = jax.random.split(jax.random.key(args.seed))
    state = digits.create_state(optimizer, init_key, training.images.shape[1])
    history = []
    settings = {
        "data_sha256": sha256(examples),
        "learning_rate": args.learning_rate,
        "momentum": args.momentum,
        "centered": args.centered,
        "batch_size": args.batch_size,
        "seed": args.seed,
    }

    with checkpoints.open_folder(args.output / "checkpoints") as manager:
        if args.resume:
            state, history = checkpoints.restore(manager, state, settings)
        else:
            checkpoints.remove_all(manager)
            (args.output / "results.json").unlink(missing_ok=True)
        if len(history) > args.epochs:
            raise digits.InputError(
                f"--epochs {args.epochs} is less than the {len(history)} that the run "
                f"in {args.output} already has"
            )
        with tqdm(
            total=args.epochs,
            initial=len(history),
            bar_format="{l_bar}{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]",
        ) as progress:
            for epoch in range(len(history), args.epochs):
                state, metrics = digits.train_epoch(
                    state, shuffle_key, training, validation, batch_size=args.batch_size
                )
                history.append({name: float(value) for name, value in metrics.items()})
                if not all(map(math.isfinite, history[-1].values())):
                    raise digits.InputError(
                        f"the loss is no longer finite in epoch {epoch + 1}; "
                        "try a lower --learning-rate"
                    )
                checkpoints.save(manager, state, history, settings)
                progress.set_postfix(history[-1], refresh=False)
                progress.update()

    final = dict(history[-1])
    for unseen in test:
        loss, accuracy = digits.loss_and_accuracy(state.params, state.apply_fn, unseen)
        final |= {"test_loss": float(loss), "test_accuracy": float(accuracy)}
    draw_curves(history, args.output / "curves.png")
    results = {
        "data": str(args.data or "scikit-learn's digits"),
        "settings": settings | {"epochs": args.epochs},
        "final": final,
        "history": history,
        "state_sha256": sha256(state),
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
    }
    checkpoints.write_json(results, args.output / "results.json")
    print_table(final)
    print(f"curves.png, results.json and checkpoints are in {args.output}")


def sha256(tree: Any) -> str:
    """A fingerprint of all leaves, bit for bit."""
    fingerprint = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        fingerprint.update(np.asarray(leaf).tobytes())
    return fingerprint.hexdigest()


def draw_curves(history: list[dict[str, float]], path: Path) -> None:
    epochs = range(1, len(history) + 1)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for label, key in (("training", metric), ("validation", f"val_{metric}")):
            values = [metrics[key] for metrics in history]
            axes.plot(epochs, values, marker=".", label=f"{label}: {values[-1]:.3f}")
        axes.set(xlabel="epoch", title=metric)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def print_table(final: dict[str, float]) -> None:
    print(f"{'':10}  {'loss':>8}  {'accuracy':>8}")
    for label, prefix in (("training", ""), ("validation", "val_"), ("test", "test_")):
        if f"{prefix}loss" in final:
            loss, accuracy = final[f"{prefix}loss"], final[f"{prefix}accuracy"]
            print(f"{label:10}  {loss:8.4f}  {accuracy:8.4f}")


def make_parser() -> command_line.Parser:
    positive = command_line.number(float, 1e-30, 1e30, "a number from 1e-30 to 1e30")
    fraction = command_line.number(float, 0, math.nextafter(1, 0), "a number in [0, 1)")
    count = command_line.number(int, 1, 10**9, "a whole number of at least 1")
    seed = command_line.number(int, 0, 2**32 - 1, "a whole number in [0, 2**32)")

    parser = command_line.Parser(
        prog="train_digits.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--learning-rate", type=positive, default=0.001, help="default 0.001")
    add("--momentum", type=fraction, default=0.0, help="default 0")
    add("--centered", action="store_true", help="divide by the standard deviation")
    add("--epochs", type=count, default=10, help="default 10")
    add("--batch-size", type=count, default=32, help="default 32")
    add("--seed", type=seed, default=0, help="default 0")
    add(
        "--data",
        type=Path,
        help="an npz file with x_train, y_train, x_test and y_test, the images of "
        "28x28 pixels in uint8; default scikit-learn's digits",
    )
    add("--output", type=Path, default=Path("runs/digits"), help="default runs/digits")
    add(
        "--resume",
        action="store_true",
        help="continue the run in the output folder, with the same settings and at "
        "least as many epochs; without this flag, a run that is there is replaced",
    )
    return parser


if __name__ == "__main__":
    main()
