# SPDX-License-Identifier: Apache-2.0
"""Runs handed over between PyTorch or timm and JAX, in memory and through files."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import frameworks, reference, torch_runs, trajectory
from helpers.comparison import assert_same_bits
from helpers.torch_runs import BOUND

from optax_rms.dialects import torch as dialect

torch = frameworks.require("torch")
safetensors_torch = frameworks.require("safetensors.torch")
timm = frameworks.require_submodule("timm.optim.rmsprop_tf")
stable_baselines3 = frameworks.require_submodule(
    "stable_baselines3.common.sb2_compat.rmsprop_tf_like"
)
pfrl = frameworks.require_submodule("pfrl.optimizers.rmsprop_eps_inside_sqrt")
pytestmark = [
    pytest.mark.parity,
    # pfrl calls tensors' methods with a number before the tensors.
    pytest.mark.filterwarnings("ignore:This overload of"),
]

RMSprop, RMSpropTF = torch.optim.RMSprop, timm.RMSpropTF
RMSpropTFLike = stable_baselines3.RMSpropTFLike
RMSpropEpsInsideSqrt = pfrl.RMSpropEpsInsideSqrt
DECOUPLED = {"decoupled_decay": True, "weight_decay": 5.0}
VARIANTS = {
    "torch": (RMSprop, {}),
    "torch, momentum": (RMSprop, {"momentum": 0.9}),
    "torch, centered": (RMSprop, {"centered": True, "alpha": 0.9}),
    "torch, decay": (RMSprop, {"weight_decay": 0.1, "maximize": True}),
    "torch, everything": (
        RMSprop,
        {"momentum": 0.8, "centered": True, "maximize": True, "eps": 1e-5},
    ),
    "timm": (RMSpropTF, {}),
    "timm, momentum": (RMSpropTF, {"momentum": 0.9}),
    "timm, rate outside": (RMSpropTF, {"momentum": 0.9, "lr_in_momentum": False}),
    "timm, centered": (RMSpropTF, {"centered": True}),
    "timm, decay": (RMSpropTF, {"weight_decay": 0.1}),
    "timm, everything": (
        RMSpropTF,
        {"momentum": 0.9, "centered": True, "caution": True, **DECOUPLED},
    ),
    "timm, corrected decay": (
        RMSpropTF,
        {"corrected_weight_decay": True, "lr": 2e-3, **DECOUPLED},
    ),
    "stable-baselines3": (RMSpropTFLike, {}),
    "stable-baselines3, everything": (
        RMSpropTFLike,
        {"momentum": 0.8, "centered": True, "alpha": 0.9, "eps": 1e-5},
    ),
    "pfrl": (RMSpropEpsInsideSqrt, {}),
    "pfrl, everything": (
        RMSpropEpsInsideSqrt,
        {"momentum": 0.8, "centered": True, "alpha": 0.9, "eps": 1e-5},
    ),
}
# Their state dicts do not tell them from PyTorch's.
NAMED = (RMSpropTFLike, RMSpropEpsInsideSqrt)
STEPS = 75
RATES = torch_runs.changing_rates(STEPS)


def make_run(options, dtype=np.float32):
    """Parameters and gradients: no constant ones, whose variance PyTorch loses."""
    columns = np.delete(reference.gradient_stream(STEPS), [7, 8], axis=1)
    rest = reference.gradient_stream(STEPS, seed=1)[:, [0, 2, 9]]
    gradients = {"weight": columns.reshape(STEPS, 2, 5), "bias": rest}
    # Away from 0, gradients depend only slightly on a coupled decay.
    start = 1.0 if options.get("weight_decay") == 0.1 else 0.0
    params = {name: np.full(g.shape[1:], start, dtype) for name, g in gradients.items()}
    return params, jax.tree.map(lambda g: g.astype(dtype), gradients)


def convert(arrays):
    """As for weights: from tensors, by their methods."""
    return {
        "kernel": jnp.array(arrays["weight"].detach().numpy().T),
        "bias": jnp.array(arrays["bias"].detach().numpy()),
    }


def convert_back(params):
    return {"weight": params["kernel"].T, "bias": params["bias"]}


def convert_gradients(gradients):
    return {"kernel": gradients["weight"].transpose(0, 2, 1), "bias": gradients["bias"]}


def part(tree, first, last):
    return jax.tree.map(lambda x: x[first:last], tree)


def assert_same(actual, expected):
    """Equal state dicts: keys, settings, and tensors bit for bit, with their dtypes."""

    def plain(x):
        if isinstance(x, torch.Tensor):
            return str(x.dtype), tuple(x.shape), x.flatten().view(torch.uint8).tolist()
        return x

    assert jax.tree.map(plain, actual) == jax.tree.map(plain, expected)


def hand_over_twice(make, params, gradients):
    """25 steps in PyTorch, 25 in JAX, 25 in PyTorch: all parameters on the way."""
    optimizer = make(params)
    kind = type(optimizer).__name__ if isinstance(optimizer, NAMED) else None
    first = torch_runs.run_torch(optimizer, part(gradients, 0, 25), RATES[:25])
    state_dict = optimizer.state_dict()
    tx, state = dialect.import_state(
        state_dict,
        convert,
        learning_rate=torch_runs.schedule_of(RATES),
        optimizer=kind,
    )

    def export(state):
        return dialect.export_state(
            state, convert_back, like=state_dict, optimizer=kind
        )

    assert_same(export(state), state_dict)

    params = convert({name: torch.tensor(steps[-1]) for name, steps in first.items()})
    middle, state = torch_runs.run_jax(
        tx, params, part(convert_gradients(gradients), 25, 50), state
    )
    middle = {"weight": middle["kernel"].transpose(0, 2, 1), "bias": middle["bias"]}

    optimizer = make({name: steps[-1] for name, steps in middle.items()})
    exported = export(state)
    optimizer.load_state_dict(exported)
    # What pfrl inherits from PyTorch makes a tensor of its integer step.
    if not isinstance(optimizer, RMSpropEpsInsideSqrt):
        assert_same(optimizer.state_dict(), exported)
    last = torch_runs.run_torch(optimizer, part(gradients, 50, 75), RATES[50:])
    return {n: np.concatenate([first[n], middle[n], last[n]]) for n in first}


def assert_continues(make, params, gradients):
    expected = torch_runs.run_torch(make(params), gradients, RATES)
    actual = hand_over_twice(make, params, gradients)
    for name in params:
        error = torch_runs.relative_error(actual[name], expected[name], params[name])
        assert error <= BOUND


@pytest.mark.parametrize("name", VARIANTS)
def test_run_continues(name):
    optimizer_class, options = VARIANTS[name]
    params, gradients = make_run(options)
    assert_continues(
        lambda params: torch_runs.make_optimizer(optimizer_class, params, **options),
        params,
        gradients,
    )


@pytest.mark.parametrize("optimizer_class", [RMSprop, RMSpropTF])
def test_run_of_several_groups_continues(optimizer_class):
    def make(params):
        weight, bias = (torch.nn.Parameter(torch.tensor(p)) for p in params.values())
        return optimizer_class(
            [
                {"params": [("weight", weight)], "momentum": 0.9, "weight_decay": 0.1},
                {"params": [("bias", bias)], "centered": True, "alpha": 0.95},
            ]
        )

    assert_continues(make, *make_run({"weight_decay": 0.1}))


def test_run_of_complex_parameters_continues():
    params, gradients = make_run({}, np.complex64)
    gradients = jax.tree.map(lambda g: g + np.complex64(1j) * g[::-1], gradients)
    options = {"momentum": 0.5}
    assert_continues(
        lambda params: torch_runs.make_optimizer(RMSprop, params, **options),
        params,
        gradients,
    )


def test_a_new_state_would_not_continue():
    """The runs of these tests tell a state from an empty one."""
    params, gradients = make_run({})
    optimizer = torch_runs.make_optimizer(RMSprop, params)
    expected = torch_runs.run_torch(optimizer, gradients, RATES)
    gradients = part(convert_gradients(gradients), 25, 50)
    start = convert({name: torch.tensor(p[24]) for name, p in expected.items()})
    tx = dialect.rmsprop(torch_runs.schedule_of(RATES[25:]))
    actual, _ = torch_runs.run_jax(tx, start, gradients)
    for actual_steps, expected_steps in (
        (actual["kernel"].transpose(0, 2, 1), expected["weight"][25:50]),
        (actual["bias"], expected["bias"][25:50]),
    ):
        error = torch_runs.relative_error(
            actual_steps, expected_steps, expected_steps[0]
        )
        assert error >= 100 * BOUND


@pytest.fixture(name="saved")
def _saved():
    """The state dict of a short run, and what is imported from it."""
    params, gradients = make_run({})
    optimizer = torch_runs.make_optimizer(RMSprop, params, momentum=0.9, centered=True)
    torch_runs.run_torch(optimizer, part(gradients, 0, 3), RATES[:3])
    state_dict = optimizer.state_dict()
    return state_dict, dialect.import_state(state_dict, convert)[1]


def test_file_of_torch_save(saved, tmp_path):
    state_dict, expected = saved
    torch.save(state_dict, tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    _, state = dialect.import_state(loaded, convert)
    assert_same_bits(state, expected)
    assert_same(dialect.export_state(state, convert_back, like=loaded), state_dict)


@pytest.mark.parametrize("framework", ["pt", "np"])
def test_file_of_safetensors(saved, tmp_path, framework):
    """Tensors in the file, groups in its metadata; read as tensors or as NumPy's."""
    state_dict, expected = saved
    safetensors_torch.save_file(
        {
            f"state.{key}.{slot}": array
            for key, slots in state_dict["state"].items()
            for slot, array in slots.items()
        },
        tmp_path / "optimizer.safetensors",
        metadata={"param_groups": json.dumps(state_dict["param_groups"])},
    )
    safe_open = frameworks.require("safetensors").safe_open
    with safe_open(tmp_path / "optimizer.safetensors", framework) as file:
        loaded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        loaded |= file.metadata()
    read = convert if framework == "pt" else convert_arrays
    _, state = dialect.import_state(loaded, read)
    assert_same_bits(state, expected)
    if framework == "pt":
        assert_same(dialect.export_state(state, convert_back, like=loaded), state_dict)


def convert_arrays(arrays):
    return {"kernel": jnp.array(arrays["weight"]).T, "bias": jnp.array(arrays["bias"])}


def test_names_for_keys(saved):
    """As distributed checkpoints have them."""
    state_dict, expected = saved
    (group,) = state_dict["param_groups"]
    names = group["param_names"]
    by_name = {
        "state": {name: state_dict["state"][i] for i, name in enumerate(names)},
        "param_groups": [{k: v for k, v in group.items() if k != "param_names"}],
    }
    by_name["param_groups"][0]["params"] = names
    _, state = dialect.import_state(by_name, convert)
    assert_same_bits(state, expected)
    assert_same(dialect.export_state(state, convert_back, like=by_name), by_name)


def test_old_state_dicts(saved):
    """Without the settings of today, and with integers as steps."""
    state_dict, expected = saved
    (group,) = state_dict["param_groups"]
    for key in ("foreach", "maximize", "capturable", "differentiable"):
        del group[key]
    for slots in state_dict["state"].values():
        slots["step"] = int(slots["step"])
    _, state = dialect.import_state(state_dict, convert)
    assert_same_bits(state, expected)
    exported = dialect.export_state(state, convert_back, like=state_dict)
    assert_same(exported, state_dict)
    torch_runs.make_optimizer(RMSprop, make_run({})[0]).load_state_dict(exported)


def test_rates_in_tensors_and_schedulers():
    params, gradients = make_run({})
    optimizer = torch_runs.make_optimizer(RMSprop, params, lr=torch.tensor(0.25))
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, 10, cycle_momentum=False)
    torch_runs.run_torch(optimizer, part(gradients, 0, 3), RATES[:3])
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    with pytest.warns(UserWarning, match=r"param_groups \[0\] have 'initial_lr'"):
        tx, state = dialect.import_state(optimizer.state_dict(), convert)
    expected, _ = dialect.import_state(optimizer.state_dict(), convert, None, 0.25)
    gradients = convert_gradients(part(gradients, 3, 4))
    gradients = jax.tree.map(lambda g: g[0], gradients)
    assert_same_bits(tx.update(gradients, state), expected.update(gradients, state))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    """Wider than the state dict's or as wide; back again, they are what they were."""
    params = {"a": torch.nn.Parameter(torch.ones(2, 3, dtype=dtype))}
    optimizer = RMSprop(params.items(), momentum=0.9, centered=True)
    for t in range(3):
        params["a"].grad = torch.arange(1, 7, dtype=dtype).reshape(2, 3) + t
        optimizer.step()
    state_dict = optimizer.state_dict()
    with trajectory.x64():
        _, state = dialect.import_state(state_dict, lambda a: a["a"].numpy())
        exported = dialect.export_state(state, lambda p: {"a": p}, like=state_dict)
    width = np.float64 if dtype == torch.float64 else np.float32
    assert state[0].variance.dtype == width
    assert_same(
        {k: v for k, v in exported["state"][0].items() if k != "square_avg"},
        {k: v for k, v in state_dict["state"][0].items() if k != "square_avg"},
    )
    with trajectory.x64():
        _, again = dialect.import_state(exported, lambda a: a["a"].numpy())
    assert_same_bits(again, state)
    optimizer.load_state_dict(exported)


def test_imported_state_is_a_copy(saved):
    """PyTorch goes on to change its tensors in place."""
    state_dict, _ = saved
    _, state = dialect.import_state(state_dict, dict)
    before = jax.tree.map(np.array, state)
    for slots in state_dict["state"].values():
        for tensor in slots.values():
            tensor.fill_(-1)
    assert_same_bits(state, before)


def test_parameters_without_state():
    """A frozen parameter has none, and stays without, until it has a gradient."""
    params, gradients = make_run({})
    optimizer = torch_runs.make_optimizer(RMSprop, params, momentum=0.9)
    weight, bias = optimizer.param_groups[0]["params"]
    weight.grad = torch.tensor(gradients["weight"][0])
    optimizer.step()
    state_dict = optimizer.state_dict()
    named = {"weight": weight, "bias": bias}
    tx, state = dialect.import_state(state_dict, convert, named)
    exported = dialect.export_state(state, convert_back, named, like=state_dict)
    assert_same(exported, state_dict)

    g = {"kernel": jnp.zeros((5, 2)), "bias": jnp.asarray(gradients["bias"][0])}
    _, state = tx.update(g, state)
    exported = dialect.export_state(state, convert_back, named, like=state_dict)
    bias.grad, weight.grad = torch.tensor(gradients["bias"][0]), torch.zeros(2, 5)
    optimizer.step()
    optimizer.load_state_dict(exported)
    for key, slots in optimizer.state_dict()["state"].items():
        for slot, tensor in slots.items():
            # A few roundings apart.
            np.testing.assert_allclose(tensor, exported["state"][key][slot], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_export_to_a_new_optimizer(dtype):
    """Trained in JAX from the start."""
    params = {"weight": np.ones((2, 3), dtype)}
    tx = dialect.rmsprop(0.1, momentum=0.9)
    g = jnp.asarray(params["weight"])
    _, state = tx.update(g, tx.init(g))
    optimizer = torch_runs.make_optimizer(RMSprop, params, lr=0.1, momentum=0.9)
    (p,) = optimizer.param_groups[0]["params"]
    exported = dialect.export_state(
        state, lambda p: {"weight": p}, {"weight": p}, like=optimizer.state_dict()
    )
    p.grad = torch.tensor(params["weight"])
    optimizer.step()
    expected = optimizer.state_dict()["state"][0]
    optimizer.load_state_dict(exported)
    for slot, tensor in optimizer.state_dict()["state"][0].items():
        assert tensor.dtype == expected[slot].dtype
        np.testing.assert_allclose(tensor, expected[slot], rtol=1e-6)


lr_scheduler = torch.optim.lr_scheduler
swa_utils = frameworks.require("torch.optim.swa_utils")
SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(
        o, 5
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1.0, 10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "ReduceLROnPlateau": lr_scheduler.ReduceLROnPlateau,
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ConstantLR(o)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o), lr_scheduler.ConstantLR(o)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05),
}


def test_the_schedulers_of_these_tests_are_all_that_torch_has():
    classes = {
        name
        for name, cls in vars(lr_scheduler).items()
        if isinstance(cls, type) and issubclass(cls, lr_scheduler.LRScheduler)
    }
    assert classes - {"LRScheduler", "_LRScheduler"} == {*SCHEDULERS} - {"SWALR"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_keys_that_schedulers_leave_in_groups_pass(name):
    """With a rate of the caller's: nothing else that they leave matters to a step."""
    optimizer = torch_runs.make_optimizer(RMSprop, make_run({})[0], momentum=0.9)
    SCHEDULERS[name](optimizer)
    weight, bias = optimizer.param_groups[0]["params"]
    weight.grad, bias.grad = torch.ones(2, 5), torch.ones(3)
    optimizer.step()
    _, state = dialect.import_state(optimizer.state_dict(), convert, learning_rate=0.1)
    assert state[2].count == 1


def test_keys_that_timms_schedulers_leave_in_groups_pass():
    scheduler = frameworks.require_submodule("timm.scheduler.scheduler")

    class Constant(scheduler.Scheduler):
        def _get_lr(self, t):
            return self.base_values

    optimizer = torch_runs.make_optimizer(RMSpropTF, make_run({})[0])
    # As timm's param_groups_layer_decay makes them.
    optimizer.param_groups[0] |= {"lr_scale": 0.5, "use_fallback": False}
    Constant(optimizer, "lr").step_update(1)
    weight, bias = optimizer.param_groups[0]["params"]
    weight.grad, bias.grad = torch.ones(2, 5), torch.ones(3)
    optimizer.step()
    with pytest.warns(UserWarning, match="initial_lr"):
        _, state = dialect.import_state(optimizer.state_dict(), convert)
    assert state[1].count == 1
    optimizer.param_groups[0]["lr_multiplier"] = 0.5
    with pytest.raises(ValueError, match="lr_multiplier"):
        dialect.import_state(optimizer.state_dict(), convert)


class Model(torch.nn.Module):
    """With names of several parts, and two groups of different settings."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
        self.head = torch.nn.Linear(2, 1)

    def forward(self, x):
        return self.head(self.body(x))


def trained_model(names=False):
    torch.manual_seed(0)
    model = Model()

    def params(module, prefix):
        if names:
            return [(f"{prefix}.{n}", p) for n, p in module.named_parameters()]
        return list(module.parameters())

    optimizer = RMSprop(
        [
            {"params": params(model.head, "head"), "momentum": 0.9},
            {"params": params(model.body, "body"), "centered": True},
        ],
        lr=0.1,
    )
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def clean(arrays):
    return {name: jnp.array(arrays[name].numpy()) for name, _ in NAMED_PARAMETERS}


NAMED_PARAMETERS = list(Model().named_parameters())


def slots_here(state):
    """All slots by name, whatever the groups are called."""
    slots = {}
    for masked in state.inner_states.values():
        for part in masked.inner_state:
            for field, tree in part._asdict().items():
                if isinstance(tree, dict):
                    for name, leaf in tree.items():
                        if not isinstance(leaf, optax.MaskedNode):
                            slots[field, name] = np.asarray(leaf).tobytes()
    return slots


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_state_dicts(flatten):
    """As `get_optimizer_state_dict` returns them, and back by its inverse."""
    api = frameworks.require("torch.distributed.checkpoint.state_dict")
    model, optimizer = trained_model()
    options = api.StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = api.get_optimizer_state_dict(model, optimizer, options=options)
    assert any(key.startswith("param_groups.") for key in saved) == flatten
    named = dict(reversed(list(model.named_parameters())))
    # The groups have their own order, which that of the names must not replace.
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in named.items()}
    names = {names[id(p)]: p for p in ordered}
    _, expected = dialect.import_state(optimizer.state_dict(), clean, names)
    for given in (None, named):
        _, state = dialect.import_state(saved, clean, given)
        assert slots_here(state) == slots_here(expected)
        # The mean squares, the momentum of the head, the means of the body.
        assert len(slots_here(state)) == 6 + 2 + 4

    exported = dialect.export_state(state, lambda params: params, like=saved)
    assert sorted(len(group["params"]) for group in exported["param_groups"]) == [2, 4]
    again, other = trained_model()
    for group in other.param_groups:
        for p in group["params"]:
            other.state[p]["square_avg"].fill_(-1)
    api.set_optimizer_state_dict(again, other, exported)
    assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])


def test_groups_without_parameters_need_no_settings():
    """As `set_optimizer_state_dict` leaves them."""
    _, optimizer = trained_model(names=True)
    saved = optimizer.state_dict()
    empty = {"params": [], "foreach": None}
    with_empty = saved | {"param_groups": [empty, *saved["param_groups"]]}
    _, expected = dialect.import_state(saved, clean)
    _, state = dialect.import_state(with_empty, clean)
    assert slots_here(state) == slots_here(expected)
    exported = dialect.export_state(state, lambda p: p, like=with_empty)
    assert exported["param_groups"] == with_empty["param_groups"]


PREFIXES = {
    "compiled": (torch.compile, "_orig_mod."),
    "parallel": (torch.nn.DataParallel, "module."),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("kind", PREFIXES)
def test_prefixes_are_removed(kind):
    wrap, prefix = PREFIXES[kind]
    model, _ = trained_model()
    named = dict(wrap(model).named_parameters())
    assert all(name.startswith(prefix) for name in named)
    optimizer = RMSprop(named.items(), lr=0.1)
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"'body\.0\.weight'\. The names are") as error:
        dialect.import_state(saved, clean)
    assert f"'{prefix}body.0.weight'" in str(error.value)
    assert "strip_prefix=" in str(error.value)
    unnamed = copy.deepcopy(saved)
    del unnamed["param_groups"][0]["param_names"]
    _, expected = dialect.import_state(unnamed, clean, dict(model.named_parameters()))
    for state_dict, names in ((saved, None), (saved, named), (unnamed, named)):
        _, state = dialect.import_state(state_dict, clean, names, strip_prefix=prefix)
        assert_same_bits(state, expected)
    exported = dialect.export_state(
        state, lambda params: params, like=saved, strip_prefix=[prefix]
    )
    assert_same(exported, saved)


def test_prefixes_that_no_name_has_are_refused():
    _, optimizer = trained_model(names=True)
    with pytest.raises(
        ValueError, match=r"strip_prefix has 'module\.', with which none"
    ):
        dialect.import_state(optimizer.state_dict(), clean, strip_prefix="module.")


def test_without_names_the_message_says_how_to_give_them():
    _, optimizer = trained_model()
    with pytest.raises(ValueError, match=r"named_parameters") as error:
        dialect.import_state(optimizer.state_dict(), clean)
    assert "The names are [0, 1, 2, 3, 4, 5]" in str(error.value)


def test_tied_weights_are_named():
    """The optimizer has one state for them."""
    layer = torch.nn.Linear(2, 2, bias=False)
    model = torch.nn.ModuleDict({"embed": layer, "head": layer})
    optimizer = RMSprop(model.named_parameters())
    layer(torch.ones(2)).sum().backward()
    optimizer.step()

    def tie(arrays):
        embed = jnp.array(arrays["embed.weight"].numpy())
        return {"embed": embed, "head": embed}

    with pytest.raises(
        ValueError, match=r"Weights that two layers share(.|\n)*one leaf"
    ):
        dialect.import_state(optimizer.state_dict(), tie)


def test_identity_gives_a_state_for_dicts():
    _, optimizer = trained_model(names=True)
    tx, state = dialect.import_state(optimizer.state_dict(), lambda arrays: arrays)
    params = {name: jnp.array(p.detach().numpy()) for name, p in NAMED_PARAMETERS}
    updates, _ = tx.update(params, state, params)
    assert updates.keys() == params.keys()


def test_slots_that_code_for_shared_memory_allocates():
    """All of them, whatever the settings: zeros pass and come back, numbers do not."""
    params, gradients = make_run({})
    optimizer = torch_runs.make_optimizer(RMSprop, params)
    for p in optimizer.param_groups[0]["params"]:
        optimizer.state[p] = {
            "step": torch.zeros(1),
            "grad_avg": torch.zeros_like(p),
            "square_avg": torch.zeros_like(p),
            "momentum_buffer": torch.zeros_like(p),
        }
    torch_runs.run_torch(optimizer, part(gradients, 0, 3), RATES[:3])
    saved = optimizer.state_dict()
    _, state = dialect.import_state(saved, convert)
    assert_same(dialect.export_state(state, convert_back, like=saved), saved)
    saved["state"][0]["grad_avg"][0] = 1.0
    with pytest.raises(ValueError, match="has grad_avg, for which there is no use"):
        dialect.import_state(saved, convert)
