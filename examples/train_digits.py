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
CPU, with the same bits as a run without interruption.

At the end the same run is made with optax.rmsprop: the last line of the table has its
validation loss and accuracy, and the largest difference that a loss has in any epoch.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
import optax
from common import command_line, curves, digits, results, resumable

import optax_rms


def main(argv: list[str] | None = None) -> None:
    make_parser().run(train, argv, advice="; --resume continues this run")


def train(args: argparse.Namespace) -> None:
    examples = digits.load(args.data)
    training, validation, *test = digits.prepare(*examples, seed=args.seed)
    if args.batch_size > len(training.labels):
        raise command_line.InputError(
            f"--batch-size {args.batch_size} is more than the {len(training.labels)} "
            "training examples"
        )
    init_key, shuffle_key = jax.random.split(jax.random.key(args.seed))

    def start(rmsprop):
        optimizer = rmsprop(
            args.learning_rate, centered=args.centered, momentum=args.momentum or None
        )
        return digits.create_state(optimizer, init_key, training.images.shape[1])

    def epoch(state):
        return digits.train_epoch(
            state, shuffle_key, training, validation, batch_size=args.batch_size
        )

    names = ("learning_rate", "momentum", "centered", "batch_size", "seed")
    settings = {"data_sha256": results.sha256(examples)}
    settings |= {name: getattr(args, name) for name in names}
    state, history = resumable.train(
        epoch,
        start(optax_rms.rmsprop),
        args.epochs,
        args.output,
        settings,
        resume=args.resume,
    )
    final = dict(history[-1])
    for unseen in test:
        loss, accuracy = digits.loss_and_accuracy(state.params, state.apply_fn, unseen)
        final |= {"test_loss": float(loss), "test_accuracy": float(accuracy)}

    # A drop-in: the same program with Optax's function of the same name.
    state_in_optax, in_optax = start(optax.rmsprop), []
    for _ in history:
        state_in_optax, metrics = epoch(state_in_optax)
        in_optax.append(jax.tree.map(float, metrics))
    difference = np.max(
        [
            abs(ours[name] - theirs[name])
            for ours, theirs in zip(history, in_optax, strict=True)
            for name in ("loss", "val_loss")
        ]
    )

    curves.draw(history, args.output / "curves.png")
    found = {
        "data": str(args.data or "scikit-learn's digits"),
        "settings": settings | {"epochs": args.epochs},
        "final": final,
        "optax.rmsprop": jax.tree.map(
            results.as_json, in_optax[-1] | {"largest_difference_of_losses": difference}
        ),
        "history": history,
        "state_sha256": results.sha256(state),
        "device": jax.devices()[0].device_kind,
        "versions": results.versions(),
    }
    results.write_json(found, args.output / "results.json")
    print(f"{'':13}  {'loss':>8}  {'accuracy':>8}")
    row = "{:13}  {:8.4f}  {:8.4f}".format
    for label, part in (("training", ""), ("validation", "val_"), ("test", "test_")):
        if f"{part}loss" in final:
            print(row(label, final[f"{part}loss"], final[f"{part}accuracy"]))
    print(
        row("optax.rmsprop", in_optax[-1]["val_loss"], in_optax[-1]["val_accuracy"]),
        f" largest difference of a loss {difference:.1e}",
    )
    print(f"curves.png, results.json and checkpoints are in {args.output}")


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(__file__, __doc__, output="runs/digits")
    add = parser.add_argument
    add(
        "--learning-rate",
        type=command_line.positive,
        default=0.001,
        help="size of a step",
    )
    add(
        "--momentum",
        type=command_line.fraction,
        default=0.0,
        help="share of the step before",
    )
    add("--centered", action="store_true", help="divide by the standard deviation")
    add(
        "--epochs",
        type=command_line.count(),
        default=10,
        help="passes over the training examples",
    )
    add("--batch-size", type=command_line.count(), default=32, help="examples per step")
    add(
        "--seed",
        type=command_line.seed,
        default=0,
        help="of the weights and the order of examples",
    )
    add("--data", type=Path, help="an npz file in the layout of Keras' mnist.npz")
    add("--resume", action="store_true", help="continue the run in the output folder")
    return parser


if __name__ == "__main__":
    main()
