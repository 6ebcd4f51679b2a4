# SPDX-License-Identifier: Apache-2.0
"""Trains in PyTorch until half time, and in JAX from there to the end.

    python examples/continue_from_torch.py

The network of train_digits.py is trained with torch.optim.RMSprop, momentum and a
decaying learning rate. After half of the epochs the weights, the optimizer's state and
the scheduler move to JAX through a file, and the same batches follow. The output folder
receives the file, checkpoint.pt, and losses.png: the loss of this run, of a run that
stayed in PyTorch, and of a run that moved the weights only.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import command_line, digits
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from optax_rms import dialects

try:
    import torch
except ModuleNotFoundError:
    torch: Any = None

apply_fn: Any = digits.Network().apply

BATCH_SIZE = 32
LEARNING_RATE = 1e-3
MOMENTUM = 0.9


def main(argv: list[str] | None = None) -> None:
    make_parser().run(run, argv)


def run(args: argparse.Namespace) -> None:
    if torch is None:
        sys.exit(
            "continue_from_torch.py needs PyTorch, for example the build for CPUs: "
            "https://pytorch.org/get-started/locally/"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    training, validation = digits.prepare(*digits.load(), seed=args.seed)
    batches = list(make_batches(len(training.labels), args.epochs, args.seed))
    half = len(batches) // 2

    torch.manual_seed(args.seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(training.images.shape[1], 128),
        torch.nn.ReLU(),
        torch.nn.Linear(128, 10),
    )
    optimizer = torch.optim.RMSprop(
        model.named_parameters(), lr=LEARNING_RATE, momentum=MOMENTUM
    )
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    first = train_in_torch(model, optimizer, decay, training, batches[:half])

    # The run moves: the function that converts the weights converts the state as well.
    path = args.output / "checkpoint.pt"
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": decay.state_dict(),
        },
        path,
    )
    checkpoint = torch.load(path, weights_only=True)
    params = convert(checkpoint["model"])
    tx, state = dialects.torch.import_state(
        checkpoint["optimizer"], convert, lr_scheduler=checkpoint["scheduler"]
    )
    continued, final_params = train_in_jax(tx, params, state, training, batches[half:])

    # Without the state, only the schedule continues.
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, len(batches))
    tx = dialects.torch.rmsprop(lambda step: schedule(step + half), momentum=MOMENTUM)
    restarted, _ = train_in_jax(tx, params, tx.init(params), training, batches[half:])

    stayed = train_in_torch(model, optimizer, decay, training, batches[half:])
    runs = {
        "PyTorch to the end": np.append(first, stayed),
        "continued in JAX": np.append(first, continued),
        "in JAX, without the optimizer's state": np.append(first * np.nan, restarted),
    }
    draw_losses(runs, len(batches) // args.epochs, args.output / "losses.png")
    for name, params in (
        ("PyTorch to the end", convert(model.state_dict())),
        ("continued in JAX", final_params),
    ):
        loss, accuracy = digits.loss_and_accuracy(params, apply_fn, validation)
        print(f"{name:18}  validation loss {loss:.4f}  accuracy {accuracy:.4f}")
    print(f"losses.png is in {args.output}")


def convert(tensors: Any) -> Any:
    """The tree of Flax's parameters, from the tensors of PyTorch by name."""

    def dense(name: str) -> dict[str, jax.Array]:
        return {
            "kernel": jnp.array(tensors[f"{name}.weight"].numpy().T),
            "bias": jnp.array(tensors[f"{name}.bias"].numpy()),
        }

    return {"params": {"Dense_0": dense("0"), "Dense_1": dense("2")}}


def make_batches(num_examples: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """The indices of all batches, shuffled anew in every epoch."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(num_examples)
        yield from order[: num_examples // BATCH_SIZE * BATCH_SIZE].reshape(
            -1, BATCH_SIZE
        )


def train_in_torch(
    model: Any, optimizer: Any, decay: Any, training: digits.Examples, batches: Any
) -> np.ndarray:
    """Trains the model and returns the loss of each batch."""
    images = torch.tensor(np.asarray(training.images))
    labels = torch.tensor(np.asarray(training.labels), dtype=torch.long)
    losses = []
    for batch in batches:
        loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.item())
    return np.array(losses)


def train_in_jax(
    tx: optax.GradientTransformation,
    params: Any,
    state: Any,
    training: digits.Examples,
    batches: Any,
) -> tuple[np.ndarray, Any]:
    """Trains the parameters; returns the loss of each batch, and the parameters."""
    loss_and_gradients = jax.value_and_grad(digits.loss_and_accuracy, has_aux=True)

    def step(carry, batch):
        params, state = carry
        examples = digits.Examples(training.images[batch], training.labels[batch])
        (loss, _), gradients = loss_and_gradients(params, apply_fn, examples)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (params, _), losses = jax.lax.scan(step, (params, state), np.stack(batches))
    return np.asarray(losses), params


def draw_losses(runs: dict[str, np.ndarray], steps: int, path: Path) -> None:
    """Means over epochs of `steps` steps, and single steps around half time."""
    styles = (
        {"color": "0.75", "linewidth": 5},
        {"color": "tab:blue"},
        {"color": "tab:red", "linestyle": ":"},
    )
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    total = len(runs["PyTorch to the end"])
    half = total // 2
    near = np.arange(max(half - 40, 0), min(half + 60, total))
    for (name, losses), style in zip(runs.items(), styles, strict=True):
        means = losses.reshape(-1, steps).mean(axis=1)
        left.plot(np.arange(1, len(means) + 1), means, label=name, **style)
        right.plot(near, losses[near], **style)
    left.axvline(half / steps + 0.5, color="0.5", linewidth=0.8)
    right.axvline(half - 0.5, color="0.5", linewidth=0.8)
    left.set(xlabel="epoch", ylabel="training loss", yscale="log", title="all epochs")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set(xlabel="step", yscale="log", title="around half time")
    left.legend()
    figure.savefig(path, dpi=150)


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(__file__, __doc__, output="runs/torch")
    add = parser.add_argument
    add("--epochs", type=command_line.count(2), default=20, help="half of them in JAX")
    add("--seed", type=command_line.seed, default=0, help="of weights and batches")
    return parser


if __name__ == "__main__":
    main()
