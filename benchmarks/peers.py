# SPDX-License-Identifier: Apache-2.0
"""The optimizers that are compared, each ready to take steps on given leaves."""

import functools
import gc
import importlib
import importlib.util
import math
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_rms
from benchmarks.leaves import Shapes

LEARNING_RATE = 1e-3


class NotMeasured(Exception):
    """Why there is no number."""


class Run(Protocol):
    """An optimizer at work.

    Attributes:
      state_bytes: size of the optimizer's state.
      moved_bytes: bytes that a step must read and write: gradients once, parameters and
        state twice.
    """

    state_bytes: int
    moved_bytes: int

    def __call__(self, steps: int) -> None:
        """Take steps, and wait for the end of the last."""
        ...


def steps_per_round() -> int:
    """On a GPU steps queue up, as in training, so that launching them takes no time."""
    return 1 if jax.default_backend() == "cpu" else 10


class Leaves:
    """Parameters and gradients; each framework has one copy of the gradients.

    Args:
      shapes: of the parameters.
      dtype: ``"float32"`` or ``"bfloat16"``, of parameters and gradients.
    """

    def __init__(self, shapes: Shapes, dtype: str = "float32"):
        self.shapes, self.dtype = shapes, dtype
        self.elements = sum(int(np.prod(shape)) for shape in shapes)

    @functools.cached_property
    def _gradients(self) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        return [rng.standard_normal(shape, np.float32) for shape in self.shapes]

    @functools.cached_property
    def jax_gradients(self) -> list[jax.Array]:
        return [jnp.asarray(g, self.dtype) for g in self._gradients]

    def jax_params(self) -> list[jax.Array]:
        return [jnp.ones(shape, self.dtype) for shape in self.shapes]

    @functools.cached_property
    def torch_params(self) -> list[Any]:
        """All optimizers of PyTorch may move the same parameters, in place."""
        torch = module("torch")
        device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        if device == "cuda" and not torch.cuda.is_available():
            raise NotMeasured("PyTorch without CUDA")
        to = {"device": device, "dtype": getattr(torch, self.dtype)}
        params = [torch.ones(s, requires_grad=True, **to) for s in self.shapes]
        for param, gradient in zip(params, self._gradients, strict=True):
            param.grad = torch.from_numpy(gradient).to(**to)
        return params


class JaxRun:
    """A jitted function of parameters, state and gradients to the first two, donated.

    Attributes:
      compiled: the executable, which reports its memory and traffic.
      compile_seconds: seconds to trace, to lower and to compile the step.
    """

    def __init__(self, step: Callable, params: Any, state: Any, gradients: Any):
        self._carry, self._gradients = (params, state), gradients
        self.state_bytes = size(state)
        self.moved_bytes = 2 * size(self._carry) + size(gradients)
        self.compiled, self.compile_seconds = compile_stages(
            step, params, state, gradients
        )

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self._carry = self.compiled(*self._carry, self._gradients)
        jax.block_until_ready(self._carry)


def compile_stages(step: Callable, *arguments: Any) -> tuple[Any, dict[str, float]]:
    """Compile a step with two donated arguments; return also the seconds per stage."""
    # This library caches the traced function of a leaf for all optimizers.
    jax.clear_caches()
    gc.collect()  # otherwise the garbage of another side is collected in this time
    times = [time.perf_counter()]
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(*arguments)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    stages = zip(("trace", "lower", "compile"), np.diff(times).tolist(), strict=True)
    return compiled, dict(stages)


def jax_step(tx: optax.GradientTransformation) -> Callable:
    """The step that every user writes."""

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def jax_run(make: Callable[[], optax.GradientTransformation], leaves: Leaves) -> JaxRun:
    tx, params = make(), leaves.jax_params()
    return JaxRun(jax_step(tx), params, tx.init(params), leaves.jax_gradients)


def keras_run(leaves: Leaves) -> JaxRun:
    """Keras' own function for use within `jax.jit`, compiled like the other sides."""
    keras = module("keras")
    variables = [keras.Variable(p) for p in leaves.jax_params()]
    optimizer = keras.optimizers.RMSprop(LEARNING_RATE)
    optimizer.build(variables)

    def step(params, state, gradients):
        return optimizer.stateless_apply(state, gradients, params)

    # Donation invalidates the arrays of Keras' variables, which are not read again.
    params, state = ([v.value for v in vs] for vs in (variables, optimizer.variables))
    return JaxRun(step, params, state, leaves.jax_gradients)


class TorchRun:
    """An optimizer of PyTorch."""

    def __init__(self, optimizer: Any, params: list[Any], is_compiled: bool = False):
        torch = module("torch")
        self._step = optimizer.step
        self._wait = (
            torch.cuda.synchronize if params[0].is_cuda else torch.cpu.synchronize
        )
        if is_compiled:
            torch._dynamo.reset()
            self._step = torch.compile(optimizer.step)
        try:
            self(1)
        except RuntimeError as error:
            line = str(error).strip().splitlines()[0]
            raise NotMeasured(f"fails: {line}") from error
        state = [x for s in optimizer.state.values() for x in s.values()]
        tensors = [x for x in state if isinstance(x, torch.Tensor)]
        self.state_bytes = sum(x.nbytes for x in tensors)
        leaf_bytes = sum(p.nbytes for p in params)
        self.moved_bytes = 2 * self.state_bytes + 3 * leaf_bytes

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self._step()
        self._wait()


def torch_run(leaves: Leaves, **options: Any) -> TorchRun:
    params, torch = leaves.torch_params, module("torch")
    return TorchRun(torch.optim.RMSprop(params, LEARNING_RATE, **options), params)


def torch_compile_run(leaves: Leaves) -> TorchRun:
    params, torch = leaves.torch_params, module("torch")
    optimizer = torch.optim.RMSprop(params, LEARNING_RATE)
    return TorchRun(optimizer, params, is_compiled=True)


def timm_run(leaves: Leaves) -> TorchRun:
    module("timm", is_imported=False)
    from tests.helpers.frameworks import require_submodule

    params = leaves.torch_params
    optimizer = require_submodule("timm.optim.rmsprop_tf").RMSpropTF
    return TorchRun(optimizer(params, LEARNING_RATE), params)


def bitsandbytes_run(name: str, leaves: Leaves) -> TorchRun:
    optimizer = getattr(module("bitsandbytes").optim, name)
    params = leaves.torch_params
    return TorchRun(optimizer(params, LEARNING_RATE), params)


class Copy:
    """Reads and writes one large array in place, at the bandwidth of the memory.

    Args:
      moved_bytes: how many bytes to read and write, together; above 512 MB, when no
        cache holds them, all sizes have the same bandwidth.
    """

    def __init__(self, moved_bytes: int):
        length = max(1, min(moved_bytes, 2**29) // 8)
        self.moved_bytes = 8 * length
        self._x = jnp.zeros(length, jnp.float32)
        self._step = jax.jit(lambda x: x + 1, donate_argnums=0)

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self._x = self._step(self._x)
        self._x.block_until_ready()


def size(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def module(name: str, is_imported: bool = True) -> Any:
    """Import a peer, or only check that the peer is installed."""
    if importlib.util.find_spec(name) is None:
        raise NotMeasured("not installed")
    return importlib.import_module(name) if is_imported else None


def _compressed(
    momentum: float | None = None, **formats: optax_rms.Minifloat
) -> optax.GradientTransformation:
    inner = optax_rms.rmsprop(LEARNING_RATE, momentum=momentum)
    return optax_rms.compress_state(inner, **formats)


def _factored() -> optax.GradientTransformation:
    scale = optax.scale_by_learning_rate(LEARNING_RATE)
    return optax.chain(optax.scale_by_factored_rms(), scale)


def _rmsprop(library: ModuleType, **options: Any) -> Callable[[], Any]:
    return functools.partial(library.rmsprop, LEARNING_RATE, **options)


OURS = "optax_rms.rmsprop"
UE6M2 = "optax_rms.rmsprop, nu=UE6M2"
UE6M2_MOMENTUM = "optax_rms.rmsprop, momentum, nu=UE6M2, trace=SE5M2"
UE8M8 = "optax_rms.rmsprop, nu=UE8M8"
SPLIT = "optax_rms.rmsprop, nu=UE6M2, split_master_weights"
OPTAX = "optax.rmsprop"
FACTORED = "optax.scale_by_factored_rms"
KERAS = "keras.optimizers.RMSprop"
EAGER = "torch.optim.RMSprop, foreach=False"
FOREACH = "torch.optim.RMSprop, foreach=True"
COMPILED = "torch.optim.RMSprop, torch.compile"
TIMM = "timm RMSpropTF"
BITSANDBYTES = "bitsandbytes RMSprop"
BITSANDBYTES_8BIT = "bitsandbytes RMSprop8bit"
MOMENTUM = ", momentum"
CENTERED = ", centered, momentum"

TRANSFORMATIONS: dict[str, Callable[[], optax.GradientTransformation]] = {
    OURS: _rmsprop(optax_rms),
    OURS + MOMENTUM: _rmsprop(optax_rms, momentum=0.9),
    OURS + CENTERED: _rmsprop(optax_rms, centered=True, momentum=0.9),
    UE6M2: lambda: _compressed(nu=optax_rms.UE6M2),
    UE6M2_MOMENTUM: lambda: _compressed(
        momentum=0.9, nu=optax_rms.UE6M2, trace=optax_rms.SE5M2
    ),
    UE8M8: lambda: _compressed(nu=optax_rms.UE8M8),
    SPLIT: lambda: optax_rms.split_master_weights(_compressed(nu=optax_rms.UE6M2)),
    OPTAX: _rmsprop(optax),
    OPTAX + MOMENTUM: _rmsprop(optax, momentum=0.9),
    OPTAX + CENTERED: _rmsprop(optax, centered=True, momentum=0.9),
    FACTORED: _factored,
}

SIDES: dict[str, Callable[[Leaves], Run]] = {
    **{
        name: functools.partial(jax_run, make) for name, make in TRANSFORMATIONS.items()
    },
    KERAS: keras_run,
    EAGER: functools.partial(torch_run, foreach=False),
    FOREACH: functools.partial(torch_run, foreach=True),
    COMPILED: torch_compile_run,
    TIMM: timm_run,
    BITSANDBYTES: functools.partial(bitsandbytes_run, "RMSprop"),
    BITSANDBYTES_8BIT: functools.partial(bitsandbytes_run, "RMSprop8bit"),
}


# With a thousand leaves these sides take several minutes to compile, on a CPU.
MOST_COMPILED_LEAVES = 200
MOST_LEAVES = {SPLIT: 200, COMPILED: MOST_COMPILED_LEAVES}


def choose(names: list[str], quick: bool) -> list[str]:
    """If ``quick``, all but PyTorch's compiler, which takes half a minute to start."""
    return [name for name in names if not (quick and name == COMPILED)]


def start(names: list[str], leaves: Leaves) -> tuple[dict[str, Run], dict[str, str]]:
    """The runs of these sides, and the reasons for the missing sides."""
    runs, reasons = {}, {}
    for name in names:
        if len(leaves.shapes) > MOST_LEAVES.get(name, math.inf):
            reasons[name] = "takes minutes to compile"
            continue
        try:
            runs[name] = SIDES[name](leaves)
        except NotMeasured as reason:
            reasons[name] = str(reason)
    return runs, reasons
