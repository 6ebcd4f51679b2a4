# SPDX-License-Identifier: Apache-2.0
"""The transformer with 4 bytes per weight: what it stores, and that it learns."""

import json

import jax
import jax.numpy as jnp
import low_memory
import matplotlib.image
import numpy as np
import optax
import pytest
from common import characters

import optax_rms

# A whole program runs for them.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output folder, the results and what was printed."""
    output = tmp_path_factory.mktemp("memory")
    with pytest.MonkeyPatch.context() as monkeypatch:
        printed = []
        monkeypatch.setattr("builtins.print", lambda *words: printed.append(*words))
        # Of Optax, Adam's bias correction alone does not bear strict promotion.
        with jax.numpy_dtype_promotion("standard"):
            low_memory.main(["--quick", "--steps", "80", "--output", str(output)])
    found = json.loads((output / "low_memory.json").read_text())
    return output, found, "\n".join(printed)


def test_bytes_per_weight(finished):
    _, found, printed = finished
    expected = {
        "float32 Adam": {"weights": 4, "mean square": 4, "mean": 4},
        "float32 RMSProp": {"weights": 4, "mean square": 4},
        "4-byte RMSProp": {"weights": 2, "residual": 1, "mean square": 1},
        "plain bfloat16": {"weights": 2, "mean square": 2},
    }
    num_weights = found["num_weights"]
    assert list(found["runs"]) == list(expected)
    for name, run in found["runs"].items():
        # Step counts: of the rounding of weights and of moments, and of the optimizer;
        # and the fingerprints of the formats of weights and of moments.
        assert run["bytes"].pop("counters") <= (4 + 2) * 4
        parts = {part: n / num_weights for part, n in run["bytes"].items()}
        assert parts == expected[name]
        assert f"{name:15}  {sum(expected[name].values()):12}.00" in printed


def test_four_bytes_learn_like_float32_and_plain_bfloat16_does_not(finished):
    _, found, printed = finished
    losses = {name: np.array(run["val_loss"]) for name, run in found["runs"].items()}
    float32, four_bytes = losses["float32 RMSProp"], losses["4-byte RMSProp"]
    assert len(float32) == low_memory.EVALUATIONS + 1
    assert float32[0] == losses["float32 Adam"][0]
    assert float32[-1] < float32[0] - 0.5
    assert float32[-1] != losses["float32 Adam"][-1]
    stalled = abs(losses["plain bfloat16"] - float32)[-1]
    assert abs(four_bytes - float32)[-1] < stalled / 2
    for loss in losses.values():
        assert f"{loss[-1]:.4f}" in printed


def test_results_say_where_they_come_from(finished):
    output, found, _ = finished
    assert {"command", "date", "machine", "versions"} < found.keys()
    assert found["steps"] == 80
    picture = matplotlib.image.imread(output / "low_memory.png")
    assert picture.shape[:2] == (600, 1650)
    assert picture.std() > 0.01


def test_unknown_fields_count_as_counters():
    params = jnp.zeros(1000)
    tx = optax.chain(optax.trace(0.9), optax_rms.scale_by_rms())
    found = low_memory.count_bytes(params, tx.init(params))
    assert found == {"weights": 4000, "mean square": 4000, "counters": 4000}


@pytest.mark.parametrize(
    ("flag", "value"), [("--steps", "19"), ("--steps", "many"), ("--seed", "-1")]
)
def test_bad_value_is_named_in_one_line(capsys, flag, value):
    with pytest.raises(SystemExit):
        low_memory.main([f"{flag}={value}"])
    error = capsys.readouterr().err
    assert error.startswith(f"low_memory.py: error: argument {flag}: must be a whole")
    assert error.count("\n") == 1


def test_no_character_is_predicted_from_later_ones():
    network = characters.Transformer(vocabulary=5, width=8, depth=1)
    codes = jax.random.randint(jax.random.key(1), (1, characters.CONTEXT), 0, 5)
    changed = codes.at[0, 40].set((codes[0, 40] + 1) % 5)
    params = jax.jit(network.init)(jax.random.key(0), codes)
    apply = jax.jit(network.apply)
    differs = np.any(apply(params, codes) != apply(params, changed), axis=-1)[0]
    assert not differs[:40].any()
    assert differs[40:].all()


def test_text_is_that_of_python_in_two_parts_of_one_alphabet():
    text = characters.load()
    both = [np.asarray(part).ravel() for part in (text.training, text.validation)]
    assert set(np.concatenate(both)) == set(range(text.vocabulary))
    assert text.validation.shape[1] == characters.CONTEXT + 1
    windows = characters.batch(jax.random.key(0), jnp.arange(1000))
    assert windows.shape[1] == characters.CONTEXT + 1
    assert (np.diff(windows) == 1).all()
    assert len(np.unique(windows[:, 0])) > len(windows) / 2
