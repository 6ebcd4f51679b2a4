# SPDX-License-Identifier: Apache-2.0
"""The main job: what it learns, what it writes, what it refuses, what it survives."""

import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import matplotlib.image
import numpy as np
import optax
import pytest
import train_digits
from common import checkpoints, curves, digits, results

import optax_rms

# Of a mean of zeros and ones: the reciprocal of their number, and a product.
ROUNDING = 2 * float(np.finfo(np.float32).eps)


@pytest.fixture(autouse=True, scope="module")
def compile_equal_settings_once():
    """Compiled functions are found again by the identity of the optimizer."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for library in (optax_rms, optax):
            monkeypatch.setattr(library, "rmsprop", functools.cache(library.rmsprop))
        yield


def run(output: Path, *argv: object) -> dict:
    """Runs the script in this process and returns its results."""
    train_digits.main([str(argument) for argument in ("--output", output, *argv)])
    return json.loads((output / "results.json").read_text())


def error_line(capsys, *argv: object) -> str:
    """The one line with which the script refuses to run."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        train_digits.main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    assert exit_info.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("train_digits.py: error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removesuffix("\n")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The output folder of an uninterrupted run of four epochs."""
    output = tmp_path_factory.mktemp("finished")
    run(output, "--epochs", 4)
    return output


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "copied")


def same_files(output: Path, finished: Path) -> bool:
    return all(
        (output / name).read_bytes() == (finished / name).read_bytes()
        for name in ("results.json", "curves.png")
    )


def mnist_like() -> dict[str, Any]:
    """Ten random pictures, seen many times under noise; 10 test labels are wrong."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 128, (10, 28, 28))
    arrays = {}
    for part, size in (("train", 500), ("test", 100)):
        labels = rng.integers(0, 10, size)
        noise = rng.integers(0, 128, (size, 28, 28))
        arrays[f"x_{part}"] = (pictures[labels] + noise).astype(np.uint8)
        arrays[f"y_{part}"] = labels.astype(np.uint8)
    arrays["y_test"][:10] = (arrays["y_test"][:10] + 1) % 10
    return arrays


def test_default_settings_are_the_reference_run():
    defaults = vars(train_digits.make_parser().parse_args([]))
    assert defaults == {
        "learning_rate": 0.001,
        "momentum": 0.0,
        "centered": False,
        "epochs": 10,
        "batch_size": 32,
        "seed": 0,
        "data": None,
        "output": Path("runs/digits"),
        "resume": False,
    }


def test_network_is_the_reference_network():
    images = np.zeros((1, 784), np.float32)
    variables = jax.eval_shape(digits.Network().init, jax.random.key(0), images)
    assert jax.tree.map(np.shape, variables["params"]) == {
        "Dense_0": {"kernel": (784, 128), "bias": (128,)},
        "Dense_1": {"kernel": (128, 10), "bias": (10,)},
    }


@pytest.mark.slow
def test_mean_validation_accuracy_over_five_seeds_is_at_least_97_percent(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(checkpoints, "save", lambda *args: None)
    monkeypatch.setattr(curves, "draw", lambda *args: None)
    accuracies = [
        run(tmp_path, "--seed", seed)["final"]["val_accuracy"] for seed in range(5)
    ]
    assert len(set(accuracies)) > 1
    assert np.mean(accuracies) >= 0.97


@pytest.mark.slow
def test_one_call_per_epoch(monkeypatch, tmp_path):
    steps = []

    def counting_train_epoch(state, *args, **kwargs):
        state, metrics = train_epoch(state, *args, **kwargs)
        steps.append(int(state.step))
        return state, metrics

    train_epoch = digits.train_epoch
    monkeypatch.setattr(digits, "train_epoch", counting_train_epoch)
    run(tmp_path, "--epochs", 3)
    steps_per_epoch = int(0.8 * 1797) // 32
    in_a_run = [steps_per_epoch, 2 * steps_per_epoch, 3 * steps_per_epoch]
    assert steps == 2 * in_a_run  # the second with Optax


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        (["--learning-rate", 0.01], {"learning_rate": 0.01}),
        (["--momentum", 0.9], {"momentum": 0.9}),
        (["--centered"], {"centered": True}),
    ],
)
def test_flags_reach_the_optimizer(monkeypatch, tmp_path, flags, arguments):
    received = {}

    def recording_rmsprop(learning_rate, **kwargs):
        received.update(kwargs, learning_rate=learning_rate)
        raise KeyboardInterrupt

    monkeypatch.setattr(optax_rms, "rmsprop", recording_rmsprop)
    with pytest.raises(SystemExit):
        run(tmp_path, *flags)
    defaults = {"learning_rate": 0.001, "momentum": None, "centered": False}
    assert received == defaults | arguments


def test_seed_reaches_split_and_weights(monkeypatch, tmp_path):
    def recording_prepare(*examples, seed):
        received.append(seed)
        return prepare(*examples, seed=seed)

    def recording_create_state(optimizer, key, num_pixels):
        received.append(results.sha256(jax.random.key_data(key)))
        raise KeyboardInterrupt

    prepare = digits.prepare
    monkeypatch.setattr(digits, "prepare", recording_prepare)
    monkeypatch.setattr(digits, "create_state", recording_create_state)
    received_with = {}
    for seed in (0, 1):
        received = received_with[seed] = []
        with pytest.raises(SystemExit):
            run(tmp_path, "--seed", seed)
        assert received[0] == seed
    assert received_with[0][1] != received_with[1][1]


def test_loss_is_the_mean_cross_entropy_and_accuracy_the_share_that_is_right():
    logits = np.random.default_rng(0).normal(size=(50, 10))
    labels = logits.argmax(-1)
    labels[:20] = (labels[:20] + 1) % 10
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    examples = digits.Examples(
        jax.numpy.asarray(logits, np.float32), jax.numpy.asarray(labels, np.int32)
    )
    loss, accuracy = digits.loss_and_accuracy({}, lambda _, images: images, examples)
    # Float32: rounding of logits of size 3, exponentials and their sum, below 10 eps.
    np.testing.assert_allclose(
        loss,
        -np.log(probabilities[np.arange(50), labels]).mean(),
        rtol=10 * float(np.finfo(np.float32).eps),
    )
    assert accuracy == pytest.approx(30 / 50, rel=ROUNDING)


def test_validation_is_a_fifth_of_each_digit_and_of_nothing_trained_on():
    labels = np.repeat(np.arange(10), 50)
    images = np.arange(500)[:, None]
    training, validation = digits.prepare(digits.Examples(images, labels), seed=3)
    np.testing.assert_array_equal(np.bincount(validation.labels), np.full(10, 10))
    np.testing.assert_array_equal(np.bincount(training.labels), np.full(10, 40))
    both = np.concatenate([training.images, validation.images])
    assert len(np.unique(both)) == 500
    # Sums of 400 float32 numbers of size 1, relative error at most 400 eps.
    assert abs(np.mean(training.images)) < 400 * np.finfo(np.float32).eps
    assert abs(np.std(training.images) - 1) < 400 * np.finfo(np.float32).eps


@pytest.mark.slow
def test_each_epoch_is_shuffled_anew():
    rng = np.random.default_rng(0)
    examples = digits.Examples(
        rng.normal(size=(40, 4)).astype(np.float32), rng.integers(0, 10, 40)
    )
    key = jax.random.key(0)
    state = digits.create_state(optax_rms.rmsprop(0.0), key, num_pixels=4)
    losses = []
    for _ in range(2):
        state, metrics = digits.train_epoch(
            state, key, examples, examples, batch_size=32
        )
        losses.append(metrics["loss"])
    # The weights stay, but not the 8 examples that make no whole batch.
    assert losses[0] != losses[1]


def test_run_prints_a_table_and_writes_curves_and_results(tmp_path, capsys):
    found = run(tmp_path, "--epochs", 3, "--seed", 7)
    captured = capsys.readouterr()
    assert "3/3" in captured.err
    final = found["final"]
    for label, prefix in (("training", ""), ("validation", "val_")):
        loss, accuracy = final[f"{prefix}loss"], final[f"{prefix}accuracy"]
        assert f"{label:13}  {loss:8.4f}  {accuracy:8.4f}\n" in captured.out
        assert f"{prefix}accuracy={accuracy:.3g}" in captured.err
    assert "test" not in captured.out.split(str(tmp_path))[0]

    assert len(found["history"]) == 3
    assert found["history"][-1] == final
    assert found["history"][0]["loss"] > 2 * final["loss"]
    assert found["settings"].pop("data_sha256")
    assert found["settings"] == {
        "learning_rate": 0.001,
        "momentum": 0.0,
        "centered": False,
        "batch_size": 32,
        "seed": 7,
        "epochs": 3,
    }
    assert found["versions"]["jax"] == jax.__version__

    picture = matplotlib.image.imread(tmp_path / "curves.png")
    assert picture.shape[0] > 400
    assert picture.shape[1] > 1000
    assert picture.std() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--momentum", 0.9, "--learning-rate", 1e-4], []])
def test_the_same_run_with_optax_has_the_same_losses(tmp_path, capsys, flags):
    """The drop-in: up to rounding, which 132 steps of training pass on."""
    found = run(tmp_path, "--epochs", 3, *flags)
    in_optax, final = found["optax.rmsprop"], found["final"]
    difference = in_optax["largest_difference_of_losses"]
    assert difference >= abs(in_optax["val_loss"] - final["val_loss"])
    assert difference < 1e-4 * final["loss"]
    loss, accuracy = in_optax["val_loss"], in_optax["val_accuracy"]
    assert (
        f"optax.rmsprop  {loss:8.4f}  {accuracy:8.4f}  "
        f"largest difference of a loss {difference:.1e}\n"
    ) in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("factor", [np.nan, 1 + 1e-3])
def test_a_difference_from_optax_is_shown(monkeypatch, tmp_path, capsys, factor):
    """An optimizer that is not the same, and a run with Optax that diverges."""
    optax_rmsprop = optax.rmsprop

    def other_rmsprop(learning_rate, **kwargs):
        return optax_rmsprop(factor * learning_rate, **kwargs)

    monkeypatch.setattr(optax, "rmsprop", other_rmsprop)
    found = run(tmp_path, "--epochs", 1)
    difference = found["optax.rmsprop"]["largest_difference_of_losses"]
    if np.isnan(factor):
        assert difference is None
        assert "largest difference of a loss nan\n" in capsys.readouterr().out
    else:
        assert difference > 1e-4 * found["final"]["loss"]


@pytest.mark.slow
def test_mnist_in_keras_layout(tmp_path, capsys):
    np.savez(tmp_path / "mnist.npz", **mnist_like())
    final = run(tmp_path, "--data", tmp_path / "mnist.npz", "--epochs", 4)["final"]
    assert final["val_accuracy"] == pytest.approx(1, rel=ROUNDING)
    assert final["test_accuracy"] == pytest.approx(0.9, rel=ROUNDING)
    assert (
        f"test           {final['test_loss']:8.4f}  {final['test_accuracy']:8.4f}\n"
        in capsys.readouterr().out
    )


def test_mnist_reaches_the_reference_network(tmp_path):
    np.savez(tmp_path / "mnist.npz", **mnist_like())
    training, test = digits.load(tmp_path / "mnist.npz")
    assert training.images.shape == (500, 784)
    assert test.images.shape == (100, 784)
    np.testing.assert_array_equal(
        training.images[7], mnist_like()["x_train"][7].reshape(784)
    )


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"x_train": None}, "no array x_train"),
        ({"x_test": None, "y_test": None}, "no array x_test, y_test"),
        ({"x_train": np.zeros((500, 784), np.uint8)}, "not uint8 of shape [500, 784]"),
        ({"x_train": np.zeros((500, 28, 28))}, "not float64 of shape [500, 28, 28]"),
        ({"x_test": np.zeros((0, 28, 28), np.uint8)}, "x_test must be uint8"),
        ({"x_test": np.uint8(1)}, "not uint8 of shape []"),
        ({"y_train": np.zeros(499, np.uint8)}, "integers of shape [500], not uint8"),
        ({"y_train": np.zeros((500, 10), np.uint8)}, "not uint8 of shape [500, 10]"),
        ({"y_train": np.zeros(500)}, "not float64 of shape [500]"),
        ({"y_test": np.full(100, 10)}, "y_test must lie in 0..9, not in 10..10"),
        ({"y_test": np.arange(100) % 9 - 1}, "y_test must lie in 0..9, not in -1..7"),
        ({"y_test": np.full(100, None)}, "not a readable npz file"),
    ],
)
def test_wrong_layout_is_named_in_one_line(tmp_path, capsys, changes, complaint):
    arrays = {
        name: array
        for name, array in (mnist_like() | changes).items()
        if array is not None
    }
    path = tmp_path / "mnist.npz"
    np.savez(path, **arrays)
    line = error_line(capsys, "--data", path, "--output", tmp_path / "run")
    assert f"error: {path}: " in line
    assert complaint in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda content: None, "No such file"),
        (lambda content: b"", "not a readable npz"),
        (lambda content: b"0,0,0,0\n", "not a readable npz"),
        (lambda content: content[: len(content) // 2], "not a readable npz"),
        (lambda content: content[:-10], "not a readable npz"),
        (lambda content: content[1000:], "not a readable npz"),
        (lambda content: content[:5000] + b"?" + content[5001:], "not a readable npz"),
    ],
)
def test_unreadable_file_is_named_in_one_line(tmp_path, capsys, damage, complaint):
    path = tmp_path / "mnist.npz"
    np.savez(path, **mnist_like())
    content = damage(path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    line = error_line(capsys, "--data", path, "--output", tmp_path / "run")
    assert f"error: {path}: {complaint}" in line


def test_folder_and_single_array_are_not_data(tmp_path, capsys):
    assert "Is a directory" in error_line(capsys, "--data", tmp_path)
    np.save(tmp_path / "images.npy", mnist_like()["x_train"])
    line = error_line(capsys, "--data", tmp_path / "images.npy")
    assert "not a readable npz" in line


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--learning-rate", ["0", "-0.1", "nan", "inf", "fast"]),
        ("--momentum", ["1", "-0.1", "nan", "much"]),
        ("--epochs", ["0", "-1", "2.5", "many"]),
        ("--batch-size", ["0", "-1", "2.5", "big"]),
        ("--seed", ["-1", "4294967296", "0.5", "none"]),
    ],
)
def test_bad_value_is_named_in_one_line(capsys, flag, values):
    for value in values:
        line = error_line(capsys, f"{flag}={value}")
        assert f"argument {flag}: must be a" in line
        assert line.endswith(f"not '{value}'")


def test_unsuitable_uses_are_refused_in_one_line(tmp_path, capsys):
    assert "--momentun" in error_line(capsys, "--momentun", 0.9)
    assert "1437 training examples" in error_line(capsys, "--batch-size", 1438)
    (tmp_path / "file").touch()
    assert "file" in error_line(capsys, "--output", tmp_path / "file")


def test_run_that_is_no_longer_finite_says_so(monkeypatch, tmp_path, capsys):
    def diverging_train_epoch(state, *args, batch_size):
        return state, {"loss": jax.numpy.inf, "accuracy": 0.1}

    monkeypatch.setattr(digits, "train_epoch", diverging_train_epoch)
    with pytest.raises(SystemExit):
        run(tmp_path)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "train_digits.py: error: the loss is no longer finite in epoch 1; "
        "try a lower --learning-rate"
    )


def test_interrupted_run_resumes_to_the_same_files(
    monkeypatch, finished, tmp_path, capsys
):
    def interrupt_at_third(manager, state, history, settings):
        if len(history) == 3:
            raise KeyboardInterrupt
        save(manager, state, history, settings)

    save = checkpoints.save
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save", interrupt_at_third)
        with pytest.raises(SystemExit) as exit_info:
            run(tmp_path, "--epochs", 4)
    assert exit_info.value.code == 130
    assert capsys.readouterr().err.endswith("--resume continues this run\n")
    assert not (tmp_path / "results.json").exists()

    run(tmp_path, "--epochs", 4, "--resume")
    assert same_files(tmp_path, finished)


def test_resumed_run_may_have_more_epochs_but_not_fewer(finished, tmp_path, capsys):
    run(tmp_path, "--epochs", 2)
    run(tmp_path, "--epochs", 4, "--resume")
    assert same_files(tmp_path, finished)
    line = error_line(capsys, "--output", tmp_path, "--epochs", 3, "--resume")
    assert (
        f"--epochs 3 is less than the 4 that the run in {tmp_path} already has" in line
    )


def test_resume_of_a_finished_run_writes_its_files_again(finished, copied):
    (copied / "results.json").unlink()
    (copied / "curves.png").write_bytes(b"")
    run(copied, "--epochs", 4, "--resume")
    assert same_files(copied, finished)


def test_resume_without_a_checkpoint_starts_anew(finished, tmp_path, capsys):
    run(tmp_path, "--epochs", 4, "--resume")
    assert "no checkpoint to resume from: starting anew\n" in capsys.readouterr().err
    assert same_files(tmp_path, finished)


def test_resume_names_the_settings_that_differ(finished, copied, capsys):
    np.savez(copied / "mnist.npz", **mnist_like())
    for flags, complaint in (
        (["--seed", 1], "seed was 0, not 1"),
        (["--data", copied / "mnist.npz"], "data_sha256 was "),
        (
            ["--learning-rate", 0.01, "--momentum", 0.9, "--centered"],
            "learning_rate was 0.001, not 0.01, momentum was 0.0, not 0.9, "
            "centered was False, not True",
        ),
        (["--batch-size", 64], "batch_size was 32, not 64"),
    ):
        line = error_line(capsys, "--output", copied, "--resume", *flags)
        assert f"error: cannot resume with other settings: {complaint}" in line
        assert line.count(" was ") == complaint.count(" was ")
    assert same_files(copied, finished)


def test_without_resume_an_earlier_run_is_replaced(monkeypatch, copied):
    assert len(run(copied, "--epochs", 1)["history"]) == 1
    folders = [path.name for path in (copied / "checkpoints").iterdir()]
    assert folders == ["epoch_1"]

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "train_epoch", interrupt)
    with pytest.raises(SystemExit):
        run(copied)
    assert not (copied / "results.json").exists()


def test_the_last_two_checkpoints_are_kept(finished):
    folders = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert folders == ["epoch_3", "epoch_4"]


def delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest_file(folder: Path) -> Path:
    """The file with the numbers of the first layer."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def test_any_damage_to_the_newest_checkpoint_is_noticed(finished, tmp_path, capsys):
    settings = json.loads((finished / "results.json").read_text())["settings"]
    del settings["epochs"]
    optimizer = optax_rms.rmsprop(0.001, centered=False, momentum=None)
    template = digits.create_state(optimizer, jax.random.key(0), 64)
    newest = finished / "checkpoints" / "epoch_4"
    cases = [
        (damage, path.relative_to(newest))
        for damage in (delete, truncate, flip_a_bit)
        for path in (
            newest / "hashes.json",
            newest / "run" / "metadata",
            newest / "state" / "manifest.ocdbt",
            largest_file(newest),
        )
    ]
    cases += [(delete, Path(name)) for name in ("", "run", "state", "state/d")]
    for case, (damage, victim) in enumerate(cases):
        folder = shutil.copytree(finished / "checkpoints", tmp_path / str(case))
        damage(folder / "epoch_4" / victim)
        if victim == Path():
            (folder / "epoch_4").mkdir()
        with checkpoints.open_folder(folder) as manager:
            state, history = checkpoints.restore(manager, template, settings)
        assert capsys.readouterr().err == (
            "checkpoint of epoch 4 is incomplete or damaged and is not used\n"
        ), (damage, victim)
        assert len(history) == 3
        assert state.step == 3 * 44
        assert [path.name for path in folder.iterdir()] == ["epoch_3"]


def test_after_damage_a_resumed_run_ends_with_the_same_bits(finished, copied, capsys):
    flip_a_bit(largest_file(copied / "checkpoints" / "epoch_4"))
    run(copied, "--epochs", 4, "--resume")
    messages = capsys.readouterr().err
    assert messages.startswith("checkpoint of epoch 4 is incomplete or damaged")
    assert "3/4" in messages
    assert same_files(copied, finished)

    for epoch in (3, 4):
        delete(copied / "checkpoints" / f"epoch_{epoch}" / "state")
    run(copied, "--epochs", 4, "--resume")
    messages = capsys.readouterr().err
    assert "epoch 4 is incomplete" in messages
    assert "epoch 3 is incomplete" in messages
    assert "starting anew" in messages
    assert same_files(copied, finished)


@pytest.mark.slow
def test_killed_at_several_moments_it_ends_with_the_same_bits(tmp_path):
    def start(output: Path, *flags: str) -> subprocess.Popen:
        command = [sys.executable, train_digits.__file__, "--epochs", "20", *flags]
        return subprocess.Popen(
            [*command, "--output", output],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def kill_when(process: subprocess.Popen, there: str, delay_s: float) -> None:
        deadline = time.monotonic() + 120
        while not list(killed.glob(there)):
            assert process.poll() is None, f"ended before {there} was there"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(delay_s)
        process.kill()
        assert process.wait() == -signal.SIGKILL

    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    reference = start(uninterrupted)
    kill_when(start(killed), "checkpoints/epoch_2.*", 0)
    kill_when(start(killed, "--resume"), "checkpoints/epoch_6", 0.05)
    assert start(killed, "--resume").wait() == 0
    assert reference.wait() == 0
    assert same_files(killed, uninterrupted)
    assert not list(killed.glob("checkpoints/epoch_*.*"))
