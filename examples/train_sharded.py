# SPDX-License-Identifier: Apache-2.0
"""Trains a transformer whose weights and optimizer state lie in parts on the devices.

    python examples/train_sharded.py
    python examples/train_sharded.py --devices 8
    python examples/train_sharded.py --devices 8 --zero --compress
    python examples/train_sharded.py --devices 8 --replicas 2 --processes 2
    python examples/train_sharded.py --devices 4 --resume --epochs 40

Each device holds a part of the weights, a part of the state of RMSProp and a part of
each batch (FSDP). With --zero each device holds all weights, and a part of the state
(ZeRO, stage 1). With --replicas there are several groups of devices, and the devices of
each group hold all parts. The losses are the same for each of these arrangements, up to
the rounding of sums of gradients.

Without --devices, the devices are those of this machine. With it they are parts of the
CPU, and --processes divides them among processes that are joined by `jax.distributed`,
as the hosts of a cluster are.

The network predicts the characters of the text behind Python's `help()`. The output
folder receives train_sharded.png, results.json and a checkpoint per epoch, from which
--resume continues on any number of devices, replicas and processes.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from common import characters, command_line, processes, results, resumable
from flax.training.train_state import TrainState
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure

import optax_rms

STEPS = 20
TOKENS = STEPS * characters.BATCH_SIZE * characters.CONTEXT


def main(argv: list[str] | None = None) -> None:
    make_parser().run(run, argv, advice="; --resume continues this run")


def run(args: argparse.Namespace) -> None:
    devices = args.devices or (args.processes if args.processes > 1 else None)
    if devices and devices % args.processes:
        raise command_line.InputError(
            f"--devices {devices} is no multiple of --processes {args.processes}"
        )
    work = partial(train, args, devices and devices // args.processes)
    processes.run_together(work, args.processes)


def train(args: argparse.Namespace, cpu_devices: int | None) -> None:
    """Trains in this process, with a number of CPU devices, or with what there is."""
    if cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    mesh = make_mesh(args.replicas)
    replicated = NamedSharding(mesh, PartitionSpec())
    in_batches = NamedSharding(mesh, PartitionSpec(("replica", "part")))

    text = characters.load()
    width, depth = (16, 1) if args.quick else (64, 2)
    network = characters.Transformer(text.vocabulary, width, depth)
    init_key, batch_key = jax.random.split(jax.random.key(args.seed))
    training = jax.device_put(np.asarray(text.training), replicated)
    num_windows = len(text.validation) // characters.BATCH_SIZE * characters.BATCH_SIZE
    validation = jax.device_put(np.asarray(text.validation[:num_windows]), in_batches)
    tx = make_optimizer(args.learning_rate, args.compress)

    def create() -> TrainState:
        params = network.init(init_key, np.zeros((1, characters.CONTEXT), np.int32))
        return TrainState.create(apply_fn=network.apply, params=params, tx=tx)

    shardings = make_shardings(jax.eval_shape(create), replicated, zero=args.zero)
    state = jax.jit(create, out_shardings=shardings)()
    one_device = {"weights": nbytes(state.params), "state": nbytes(state.opt_state)}
    each_device = {
        "weights": nbytes_here(state.params),
        "state": nbytes_here(state.opt_state),
    }

    @partial(jax.jit, out_shardings=(shardings, replicated), donate_argnums=0)
    def advance(state: TrainState, training: jax.Array, validation: jax.Array) -> Any:
        def step(state: TrainState, _: None) -> Any:
            key = jax.random.fold_in(batch_key, state.step)
            windows = characters.batch(key, training)
            windows = jax.lax.with_sharding_constraint(windows, in_batches)
            loss, gradients = jax.value_and_grad(characters.loss)(
                state.params, network, windows
            )
            return state.apply_gradients(grads=gradients), loss

        state, losses = jax.lax.scan(step, state, length=STEPS)
        val_loss = characters.loss(state.params, network, validation)
        return state, {"loss": losses.mean(), "val_loss": val_loss}

    def epoch(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        start = time.perf_counter()
        state, losses = jax.block_until_ready(advance(state, training, validation))
        return state, losses | {"tokens_per_s": TOKENS / (time.perf_counter() - start)}

    names = ("learning_rate", "compress", "quick", "seed")
    settings = {name: getattr(args, name) for name in names}
    state, history = resumable.train(
        epoch, state, args.epochs, args.output, settings, resume=args.resume
    )
    # All processes take part, because each of them has a part of the state.
    whole = multihost_utils.process_allgather(state, tiled=True)
    if jax.process_index() > 0:
        return
    arrangement = {
        "devices": jax.device_count(),
        "replicas": args.replicas,
        "processes": jax.process_count(),
        "zero": args.zero,
    }
    measured = {
        "settings": settings | {"epochs": args.epochs},
        "arrangement": arrangement,
        "bytes": {"one device": one_device, "each device": each_device},
        "history": history,
        "state_sha256": results.sha256(whole),
    }
    draw(history, one_device, each_device, args.output / "train_sharded.png")
    results.save(args.output / "results.json", args.command, measured)
    print(", ".join(f"{name} {value}" for name, value in arrangement.items()))
    for part, n in each_device.items():
        print(f"{part:8} {n:9,} bytes on each device, {one_device[part]:9,} in all")
    print(f"validation loss {history[-1]['val_loss']:.4f} nats per character")
    print(f"train_sharded.png, results.json and checkpoints are in {args.output}")


def make_mesh(replicas: int) -> Mesh:
    """All devices, as rows of replicas whose columns hold the parts."""
    count = jax.device_count()
    if characters.BATCH_SIZE % count or count % replicas:
        raise command_line.InputError(
            f"{count} devices must divide a batch of {characters.BATCH_SIZE} windows, "
            f"and be a multiple of --replicas {replicas}"
        )
    return Mesh(np.reshape(jax.devices(), (replicas, -1)), ("replica", "part"))


def make_optimizer(
    learning_rate: float, compress: bool
) -> optax.GradientTransformation:
    warmup = optax.linear_schedule(0, learning_rate, 50)
    tx = optax_rms.rmsprop(warmup, decay=0.99, bias_correction=True)
    return optax_rms.compress_state(tx, nu=optax_rms.UE6M2) if compress else tx


def make_shardings(
    shapes: TrainState, replicated: NamedSharding, *, zero: bool
) -> TrainState:
    """Where the weights and the state lie, as a tree like the training state."""
    params = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=replicated),
        shapes.params,
    )
    # A momentum is a tree like the weights, so that weights can be split like it.
    momentum = optax_rms.state_shardings(optax.trace(0), params, over="part").trace
    return shapes.replace(
        step=replicated,
        params=jax.tree.map(lambda _: replicated, params) if zero else momentum,
        opt_state=optax_rms.state_shardings(shapes.tx, params, over="part"),
    )


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def nbytes_here(tree: Any) -> int:
    """Bytes on the first device of this process."""
    first = jax.local_devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


def draw(
    history: list[dict[str, float]],
    one_device: dict[str, int],
    each_device: dict[str, int],
    file: Path,
) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    steps = [STEPS * (i + 1) for i in range(len(history))]
    for key, label in (("loss", "training"), ("val_loss", "validation")):
        losses = [metrics[key] for metrics in history]
        curves.plot(steps, losses, linewidth=2, label=f"{losses[-1]:.3f}  {label}")
    curves.set(xlabel="step")
    curves.set_title("Loss, nats per character", loc="left")
    curves.grid(alpha=0.3)
    curves.legend()
    rows = {"all of it": one_device, f"1 of {jax.device_count()}": each_device}
    for row, parts in enumerate(rows.values()):
        left = 0
        for color, (part, n) in zip(
            ("tab:blue", "tab:orange"), parts.items(), strict=True
        ):
            bars.barh(row, n, 0.5, left, color=color, label=part)
            left += n
        bars.text(left, row, f" {left / 1e6:.3g} MB", va="center", fontweight="bold")
    bars.set_yticks(range(len(rows)), list(rows))
    bars.set(xticks=[], xlim=(0, 1.25 * sum(one_device.values())), ylim=(1.9, -0.5))
    bars.set_title("Bytes on a device", loc="left")
    bars.legend(list(one_device), loc="lower left", ncols=2)
    bars.spines[:].set_visible(False)
    bars.tick_params(left=False)
    figure.savefig(file, dpi=150)


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(__file__, __doc__, output="runs/sharded")
    add = parser.add_argument
    count = command_line.count()
    add("--devices", type=count, help="parts of the CPU; not the devices that exist")
    add("--replicas", type=count, default=1, help="groups that hold all parts each")
    add("--processes", type=count, default=1, help="that divide the devices")
    add("--zero", action="store_true", help="all weights on each device")
    add("--compress", action="store_true", help="a byte per mean square")
    rate = "size of a step after the first 50"
    add("--learning-rate", type=command_line.positive, default=0.003, help=rate)
    add("--epochs", type=count, default=25, help=f"of {STEPS} steps each")
    add("--seed", type=command_line.seed, default=0, help="of weights and batches")
    add("--quick", action="store_true", help="train a far smaller network")
    add("--resume", action="store_true", help="continue the run in the output folder")
    return parser


if __name__ == "__main__":
    main()
