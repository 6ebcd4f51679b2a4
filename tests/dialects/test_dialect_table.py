# SPDX-License-Identifier: Apache-2.0
"""Every row of the table in docs/other_frameworks.md, against the framework's rule.

The rules are in float64 NumPy, each written from what was found out about its framework
and not from one another. A rule takes one step: ``rule(p, g, lr, t, s, **names)``. The
dict ``s`` keeps the state, and the names are those of the table.
"""

import ast
import importlib
import itertools
import pathlib
import types

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import reference
from helpers.on_request import all_by_default_but
from helpers.running import run

import optax_rms

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
BOUND = 2e-5
STEPS = 75
RATES = (1e-2 * (1.5 + np.sin(np.arange(STEPS)))).astype(np.float32)

# Values of all names in the table; what is a flag has both.
VALUES = {
    **dict.fromkeys(["decay", "gamma", "rho", "alpha", "beta2", "gamma1"], 0.9),
    **dict.fromkeys(["rms_decay"], 0.9),
    **dict.fromkeys(["beta", "GAMMA_RMS"], 0.9),
    **dict.fromkeys(["momentum", "gamma2", "beta1"], 0.8),
    **dict.fromkeys(["eps", "epsilon", "delta", "epscut", "EPS_RMS"], 1e-3),
    **dict.fromkeys(["weight_decay", "wd", "weightDecay"], 0.1),
    **dict.fromkeys(["initialMean", "initial_scale"], 0.5),
}
FLAGS = {"centered", "eps_inside_sqrt"}


def jax_rmsprop(p, g, lr, t, s, gamma, eps):
    s["avg_sq_grad"] = s.get("avg_sq_grad", 0.0) * gamma + g**2 * (1 - gamma)
    return p - lr * g / np.sqrt(s["avg_sq_grad"] + eps)


def jax_rmsprop_momentum(p, g, lr, t, s, gamma, eps, momentum):
    s["avg_sq_grad"] = s.get("avg_sq_grad", 0.0) * gamma + g**2 * (1 - gamma)
    step = lr * g / np.sqrt(s["avg_sq_grad"] + eps)
    s["mom"] = momentum * s.get("mom", 0.0) + step
    return p - s["mom"]


def flax(p, g, lr, t, s, beta2, eps, centered):
    s["v"] = (1 - beta2) * g**2 + beta2 * s.get("v", 0.0)
    x = s["v"]
    if centered:
        s["mg"] = (1 - beta2) * g + beta2 * s.get("mg", 0.0)
        x = s["v"] - s["mg"] ** 2
    return p - lr * g / (np.sqrt(x) + eps)


def keras_2(p, g, lr, t, s, rho, epsilon, decay):
    s["a"] = rho * s.get("a", 0.0) + (1 - rho) * g**2
    return p - lr / (1 + decay * t) * g / (np.sqrt(s["a"]) + epsilon)


def bitsandbytes(p, g, lr, t, s, alpha, eps, weight_decay):
    g = g + p * weight_decay
    s["state1"] = s.get("state1", 0.0) * alpha + (1 - alpha) * g * g
    return p - lr * g / (np.sqrt(s["state1"]) + eps)


def chainer(p, g, lr, t, s, alpha, eps, eps_inside_sqrt):
    s["ms"] = alpha * s.get("ms", 0.0) + (1 - alpha) * g * g
    if eps_inside_sqrt:
        return p - lr * g / np.sqrt(s["ms"] + eps)
    return p - lr * g / (np.sqrt(s["ms"]) + eps)


def chainer_graves(p, g, lr, t, s, alpha, eps, momentum):
    s["n"] = alpha * s.get("n", 0.0) + (1 - alpha) * g * g
    s["g"] = alpha * s.get("g", 0.0) + (1 - alpha) * g
    root = np.sqrt(s["n"] - s["g"] ** 2 + eps)
    s["delta"] = momentum * s.get("delta", 0.0) - lr * g / root
    return p + s["delta"]


def pfrl(p, g, lr, t, s, alpha, eps, weight_decay, momentum, centered, start=0.0):
    g = g + weight_decay * p
    s["square_avg"] = alpha * s.get("square_avg", start) + (1 - alpha) * g * g
    x = s["square_avg"]
    if centered:
        s["grad_avg"] = alpha * s.get("grad_avg", 0.0) + (1 - alpha) * g
        x = x - s["grad_avg"] ** 2
    s["buffer"] = momentum * s.get("buffer", 0.0) + g / np.sqrt(x + eps)
    return p - lr * s["buffer"]


def stable_baselines3(p, g, lr, t, s, **names):
    return pfrl(p, g, lr, t, s, **names, start=1.0)


def mxnet_1(p, g, lr, t, s, gamma1, epsilon, wd):
    g = g + wd * p
    s["n"] = (1 - gamma1) * g**2 + gamma1 * s.get("n", 0.0)
    return p - lr * g / np.sqrt(s["n"] + epsilon)


def mxnet_1_centered(p, g, lr, t, s, gamma1, gamma2, epsilon, wd):
    g = g + wd * p
    s["n"] = (1 - gamma1) * g**2 + gamma1 * s.get("n", 0.0)
    s["g"] = (1 - gamma1) * g + gamma1 * s.get("g", 0.0)
    root = np.sqrt(s["n"] - s["g"] ** 2 + epsilon)
    s["delta"] = gamma2 * s.get("delta", 0.0) - lr * g / root
    return p + s["delta"]


def mxnet_2(p, g, lr, t, s, rho, epsilon, wd):
    g = g + wd * p
    s["var"] = rho * s.get("var", 0.0) + (1 - rho) * g**2
    return p - lr * g / (np.sqrt(s["var"]) + epsilon)


def mxnet_2_centered(p, g, lr, t, s, rho, momentum, epsilon, wd):
    g = g + wd * p
    s["mean"] = rho * s.get("mean", 0.0) + (1 - rho) * g
    s["var"] = rho * s.get("var", 0.0) + (1 - rho) * g**2
    root = np.sqrt(s["var"] - s["mean"] ** 2 + epsilon)
    s["mom"] = momentum * s.get("mom", 0.0) - lr * g / root
    return p + s["mom"]


def paddle(p, g, lr, t, s, rho, epsilon, momentum, centered, weight_decay):
    g = g + weight_decay * p
    s["mean_square"] = rho * s.get("mean_square", 0.0) + (1 - rho) * g**2
    x = s["mean_square"]
    if centered:
        s["mean_grad"] = rho * s.get("mean_grad", 0.0) + (1 - rho) * g
        x = x - s["mean_grad"] ** 2
    s["momentum"] = momentum * s.get("momentum", 0.0) + lr * g / np.sqrt(x + epsilon)
    return p - s["momentum"]


def mindspore(p, g, lr, t, s, decay, momentum, epsilon, centered, weight_decay):
    g = g + weight_decay * p
    s["mean_square"] = decay * s.get("mean_square", 1.0) + (1 - decay) * g**2
    x = s["mean_square"]
    if centered:
        s["mean_grad"] = decay * s.get("mean_grad", 0.0) + (1 - decay) * g
        x = x - s["mean_grad"] ** 2
    s["moment"] = momentum * s.get("moment", 0.0) + lr * g / np.sqrt(x + epsilon)
    return p - s["moment"]


def flux(p, dx, lr, t, s, rho, epsilon, centered):
    s["quad"] = rho * s.get("quad", 0.0) + (1 - rho) * abs(dx) ** 2
    lin = 0.0
    if centered:
        lin = s["lin"] = rho * s.get("lin", 0.0) + (1 - rho) * dx
    return p - dx * lr / (np.sqrt(s["quad"] - abs(lin) ** 2) + epsilon)


def mlx(p, g, lr, t, s, alpha, eps):
    s["v"] = alpha * s.get("v", 0.0) + (1 - alpha) * np.square(g)
    return p - lr * g / (np.sqrt(s["v"]) + eps)


def burn(p, g, lr, t, s, alpha, momentum, epsilon, centered, weight_decay):
    g = p * weight_decay + g
    s["square_avg"] = s.get("square_avg", 0.0) * alpha + g * g * (1 - alpha)
    avg = s["square_avg"]
    if centered:
        s["grad_avg"] = s.get("grad_avg", 0.0) * alpha + g * (1 - alpha)
        avg = avg - s["grad_avg"] * s["grad_avg"]
    s["buf"] = s.get("buf", 0.0) * momentum + g / (np.sqrt(avg) + epsilon)
    return p - s["buf"] * lr


def dl4j(p, g, lr, t, s, rms_decay, epsilon):
    s["G"] = s.get("G", epsilon) * rms_decay + g * g * (1 - rms_decay)
    return p - g * lr / (np.sqrt(s["G"]) + epsilon)


def lasagne(p, g, lr, t, s, rho, epsilon):
    s["accu"] = rho * s.get("accu", 0.0) + (1 - rho) * g**2
    return p - lr * g / np.sqrt(s["accu"] + epsilon)


def caffe(p, g, lr, t, s, rms_decay, delta):
    s["history"] = (1 - rms_decay) * g**2 + rms_decay * s.get("history", 0.0)
    return p - lr * g / (np.sqrt(s["history"]) + delta)


def caffe2(p, g, lr, t, s, decay, momentum, epsilon):
    ms = s.get("ms", 0.0)
    s["ms"] = ms + (1 - decay) * (g * g - ms)
    s["mom"] = s.get("mom", 0.0) * momentum + lr * g / np.sqrt(epsilon + s["ms"])
    return p - s["mom"]


def lua_torch(p, g, lr, t, s, alpha, epsilon, initialMean, weightDecay):
    g = g + weightDecay * p
    s["m"] = s.get("m", initialMean) * alpha + (1 - alpha) * g * g
    return p - lr * g / (np.sqrt(s["m"]) + epsilon)


def dqn_lua(p, g, lr, t, s):
    # The code ascends along the negative gradient.
    dw = -g
    s["g"] = s.get("g", 0.0) * 0.95 + 0.05 * dw
    s["g2"] = s.get("g2", 0.0) * 0.95 + 0.05 * dw * dw
    return p + lr * dw / np.sqrt(s["g2"] - s["g"] * s["g"] + 0.01)


def deep_q_rl(p, g, lr, t, s, rho, epsilon):
    s["acc_grad"] = rho * s.get("acc_grad", 0.0) + (1 - rho) * g
    s["acc_rms"] = rho * s.get("acc_rms", 0.0) + (1 - rho) * g**2
    return p - lr * (g / np.sqrt(s["acc_rms"] - s["acc_grad"] ** 2 + epsilon))


def sonnet(p, g, lr, t, s, decay, momentum, epsilon, centered):
    s["rms"] = s.get("rms", 0.0) * decay + g**2 * (1 - decay)
    denominator = s["rms"] + epsilon
    if centered:
        s["mg"] = s.get("mg", 0.0) * decay + g * (1 - decay)
        denominator = denominator - s["mg"] ** 2
    s["mom"] = momentum * s.get("mom", 0.0) + lr * g / np.sqrt(denominator)
    return p - s["mom"]


def oneflow(p, g, lr, t, s, alpha, eps, centered):
    s["mean_square"] = alpha * s.get("mean_square", 0.0) + (1 - alpha) * g * g
    denominator = s["mean_square"] + eps
    if centered:
        s["mean_gradient"] = alpha * s.get("mean_gradient", 0.0) + (1 - alpha) * g
        denominator = denominator - s["mean_gradient"] ** 2
    return p - lr * g / np.sqrt(denominator)


def hinton(p, g, lr, t, s):
    s["mean_square"] = 0.9 * s.get("mean_square", 0.0) + 0.1 * g**2
    root = np.sqrt(s["mean_square"])
    return p - lr * np.divide(g, root, out=np.zeros_like(g), where=root > 0)


def graves(w, g, lr, t, s):
    s["n"] = 0.95 * s.get("n", 0.0) + 0.05 * g**2
    s["g"] = 0.95 * s.get("g", 0.0) + 0.05 * g
    root = np.sqrt(s["n"] - s["g"] ** 2 + 0.0001)
    s["delta"] = 0.9 * s.get("delta", 0.0) - lr * g / root
    return w + s["delta"]


def async_rl(p, g, lr, t, s, alpha, eps):
    s["ms"] = s.get("ms", 0.0) * alpha + (1 - alpha) * g * g
    return p - lr * g / np.sqrt(s["ms"] + eps)


def cleanba(p, g, lr, t, s, decay, eps, initial_scale):
    s["nu"] = (1 - decay) * g**2 + decay * s.get("nu", initial_scale)
    return p - lr * (g / (np.sqrt(s["nu"]) + eps))


def minatar(p, g, lr, t, s, GAMMA_RMS, EPS_RMS):
    # The code ascends along the gradient of a return, at time_step t.
    s["MSG"] = GAMMA_RMS * s.get("MSG", 0.0) + (1 - GAMMA_RMS) * g * g
    return p - lr * g / np.sqrt(s["MSG"] / (1 - GAMMA_RMS ** (t + 1)) + EPS_RMS)


def netket(p, g, lr, t, s, beta, epscut, centered):
    s["nu"] = beta * s.get("nu", 0.0) + (1 - beta) * g**2
    x = s["nu"]
    if centered:
        s["mu"] = beta * s.get("mu", 0.0) + (1 - beta) * g
        x = x - s["mu"] ** 2
    return p - lr * g / np.sqrt(x + epscut)


def netket_cpp(p, g, lr, t, s, beta, epscut):
    s["st"] = beta * s.get("st", 0.0) + (1.0 - beta) * abs(g) ** 2
    return p - lr * g / (np.sqrt(s["st"]) + epscut)


def pennylane(x, grad, lr, t, s, decay, eps):
    s["accumulation"] = decay * s.get("accumulation", 0.0) + (1 - decay) * grad**2
    return x - (lr / np.sqrt(s["accumulation"] + eps)) * grad


def levanter(p, g, lr, t, s, beta1, beta2, eps):
    s["mean_square"] = beta2 * s.get("mean_square", 0.0) + (1 - beta2) * g**2
    scaled = g / (np.sqrt(s["mean_square"] / (1 - beta2 ** (t + 1))) + eps)
    s["momentum"] = beta1 * s.get("momentum", 0.0) + (1 - beta1) * scaled
    return p - lr * s["momentum"] / (1 - beta1 ** (t + 1))


def dreamer_v3(p, g, lr, t, s, beta1, beta2, eps):
    s["nu"] = beta2 * s.get("nu", 0.0) + (1 - beta2) * (g * g)
    update = g / (np.sqrt(s["nu"] / (1 - beta2 ** (t + 1))) + eps)
    s["mu"] = (1 - beta1) * update + beta1 * s.get("mu", 0.0)
    return p - lr * (s["mu"] / (1 - beta1 ** (t + 1)))


def nvidia(p, g, lr, t, s, beta1, beta2, eps):
    s["exp_avg_sq"] = beta2 * s.get("exp_avg_sq", 0.0) + (1 - beta2) * g**2
    normalized = g / (np.sqrt(s["exp_avg_sq"] / (1 - beta2 ** (t + 1))) + eps)
    s["exp_avg"] = beta1 * s.get("exp_avg", 0.0) + (1 - beta1) * normalized
    return p - lr * s["exp_avg"] / (1 - beta1 ** (t + 1))


RULES = {
    "JAX `example_libraries` `rmsprop`": jax_rmsprop,
    "JAX `example_libraries` `rmsprop_momentum`": jax_rmsprop_momentum,
    "Flax `flax.optim.RMSProp`": flax,
    "Keras 1 and 2, standalone": keras_2,
    "bitsandbytes `RMSprop32bit`": bitsandbytes,
    "Chainer `RMSprop`": chainer,
    "Chainer `RMSpropGraves`": chainer_graves,
    "pfrl `RMSpropEpsInsideSqrt`": pfrl,
    "Stable-Baselines3 `RMSpropTFLike`": stable_baselines3,
    "MXNet 1, not centered": mxnet_1,
    "MXNet 1, centered": mxnet_1_centered,
    "MXNet 2, not centered": mxnet_2,
    "MXNet 2, centered": mxnet_2_centered,
    "PaddlePaddle `RMSProp`": paddle,
    "MindSpore `nn.RMSProp`": mindspore,
    "Flux and Optimisers.jl `RMSProp`": flux,
    "MLX `RMSprop`": mlx,
    "Burn `RmsProp`": burn,
    "DL4J `RmsProp`": dl4j,
    "Lasagne `rmsprop`": lasagne,
    "Caffe `RMSPropSolver`": caffe,
    "Caffe2 `RmsProp`": caffe2,
    "Lua Torch `optim.rmsprop`": lua_torch,
    "DeepMind DQN, Lua": dqn_lua,
    "deep_q_rl `deepmind_rmsprop`": deep_q_rl,
    "Sonnet 2 `RMSProp`": sonnet,
    "OneFlow `RMSprop`": oneflow,
    "Hinton's lecture 6e": hinton,
    "Graves 2013, eq. 38-45": graves,
    "async-rl `RMSpropAsync`": async_rl,
    "Cleanba `rmsprop_pytorch_style`": cleanba,
    "MinAtar actor-critic": minatar,
    "NetKet `RmsProp`": netket,
    "NetKet in C++, and its formula in the documentation": netket_cpp,
    "PennyLane `RMSPropOptimizer`": pennylane,
    "Levanter `rmsprop`": levanter,
    "DreamerV3": dreamer_v3,
    "NVIDIA Emerging Optimizers `LaProp`": nvidia,
}


def rows_under(heading, page):
    """The rows of the table under a heading, as lists of cells."""
    lines = (DOCS / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [
        line.strip("|").split("|") for line in lines.splitlines() if line[:1] == "|"
    ]
    return [[cell.strip() for cell in row] for row in rows[2:]]


TABLE = {row[0]: row for row in rows_under("Settings", "other_frameworks.md")}
EXPRESSIONS = {
    name: row[1].strip("`") for name, row in TABLE.items() if row[1].startswith("`")
}


# Rows that differ from a row above in the names alone, and rows of LaProp, which
# tests/recipes/test_laprop.py compares with the paper.
REPEATED = {
    "DreamerV3",
    "async-rl `RMSpropAsync`",
    "Cleanba `rmsprop_pytorch_style`",
    "NetKet `RmsProp`",
    "NetKet in C++, and its formula in the documentation",
    "PennyLane `RMSPropOptimizer`",
    "Levanter `rmsprop`",
    "NVIDIA Emerging Optimizers `LaProp`",
}
ROWS = all_by_default_but(REPEATED, EXPRESSIONS)


def names_in(expression):
    """The hyperparameters in an expression: all names but the learning rate."""
    nodes = ast.walk(ast.parse(expression))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names - {"optax", "rmsprop", "recipes", "inverse_time", "lr", "stepsize"}


def combinations(expression):
    """Values of the names in an expression, with every combination of flags."""
    names = names_in(expression)
    flags = sorted(names & FLAGS)
    values = {name: VALUES[name] for name in names - FLAGS}
    for settings in itertools.product([False, True], repeat=len(flags)):
        yield values | dict(zip(flags, settings, strict=True))


def inverse_time(lr, decay):
    return lambda count: lr(count) / (1 + decay * jnp.float32(count))


def evaluate(expression, names):
    """The transformation that an expression builds, and the arguments of `rmsprop`."""
    arguments = {}

    def rmsprop(learning_rate, **settings):
        arguments.update(settings, learning_rate=learning_rate)
        return optax_rms.rmsprop(learning_rate, **settings)

    def laprop(learning_rate, b1, b2, eps):
        def debiased(count):
            return learning_rate(count) * (1 - b1) / (1 - b1 ** (count + 1))

        rmsprop(
            debiased,
            decay=b2,
            eps=eps,
            eps_in_sqrt=False,
            momentum=b1,
            bias_correction=True,
            lr_in_momentum=False,
        )
        return optax_rms.recipes.laprop(learning_rate, b1, b2, eps)

    def lr(count):
        return jnp.asarray(RATES)[count]

    scope = {"optax": optax, "rmsprop": rmsprop, "inverse_time": inverse_time}
    scope |= {"recipes": types.SimpleNamespace(laprop=laprop)}
    tx = eval(expression, {**scope, "lr": lr, "stepsize": lr, **names})
    return tx, arguments


def run_rule(rule, names, gradients):
    p, s, trajectory = np.zeros(gradients.shape[1:]), {}, []
    for t, g in enumerate(gradients.astype(np.float64)):
        p = rule(p, g, np.float64(RATES[t]), t, s, **names)
        trajectory.append(p)
    return np.stack(trajectory)


def data():
    """Gradients around epsilon, and around its root, in which its place shows."""
    streams = [reference.gradient_stream(STEPS, eps, 5) for eps in (1e-3, 1e-6)]
    return np.concatenate(streams, axis=1)


def test_every_row_has_a_rule_or_a_reason():
    assert EXPRESSIONS.keys() == RULES.keys()
    for name in TABLE.keys() - EXPRESSIONS.keys():
        assert TABLE[name][1].startswith("none: ")
    for *_, checked in TABLE.values():
        assert checked.startswith(("run, ", "source", "documentation"))


@pytest.mark.parametrize("name", ROWS)
def test_settings_follow_the_rule_of_the_framework(name):
    expression, gradients = EXPRESSIONS[name], data()
    for names in combinations(expression):
        tx, _ = evaluate(expression, names)
        expected = run_rule(RULES[name], names, gradients)
        trajectory = np.float64(run(tx, gradients).params)
        assert reference.relative_error(trajectory, expected) <= BOUND, names


@pytest.mark.parametrize("name", ROWS)
def test_every_other_setting_breaks_the_rule(name):
    gradients = data()
    *_, names = combinations(EXPRESSIONS[name])
    expected = run_rule(RULES[name], names, gradients)
    _, settings = evaluate(EXPRESSIONS[name], names)
    rate = settings["learning_rate"]
    settings["learning_rate"] = np.float64([rate(t) for t in range(STEPS)])
    decay = names.get("weight_decay", names.get("wd", names.get("weightDecay", 0.0)))
    flags = {"eps_in_sqrt": True, "centered": False, "lr_in_momentum": True}
    changes = [{"decay": 0.89}, {"initial_scale": 0.3}, {"eps": 2e-3}]
    changes += [{f: not settings.get(f, default)} for f, default in flags.items()]
    for change in changes:
        if "lr_in_momentum" in change and "momentum" not in settings:
            continue
        if "eps_in_sqrt" in change and settings["eps"] == 0:
            continue
        trajectory = reference.rmsprop(
            gradients, weight_decay=decay, **settings | change
        )
        assert reference.relative_error(trajectory, expected) >= 100 * BOUND, change


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_name_has_a_default(name):
    """Each name in the settings has a default, or the framework requires it."""
    defaults = TABLE[name][2]
    if defaults == "not read":
        return
    defaults = eval(f"dict({defaults.strip('`')})")
    assert names_in(EXPRESSIONS[name]) <= defaults.keys()


@pytest.mark.parametrize(
    "row", rows_under("Frameworks with a module of their own", "dialects.md")
)
def test_functions_named_on_the_page_exist(row):
    module, function = row[1].strip("`").rsplit(".", 1)
    assert callable(getattr(importlib.import_module(f"optax_rms.{module}"), function))
