# SPDX-License-Identifier: Apache-2.0
"""The pages on runs from PyTorch: their code runs, on files of every layout."""

import pathlib
import re
import zipfile

import jax
import numpy as np
import pytest
from helpers import frameworks
from helpers.torch_runs import BOUND

torch = frameworks.require("torch")
stable_baselines3 = frameworks.require_submodule(
    "stable_baselines3.common.sb2_compat.rmsprop_tf_like"
)
frameworks.require("safetensors")
pytestmark = [
    pytest.mark.parity,
    # Said by torch.distributed.checkpoint, which needs no process group here.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

DOCS = pathlib.Path(__file__).parents[3] / "docs"
ORDER = ["0.weight", "0.bias", "2.weight", "2.bias"]


def write_lightning(model, optimizer, scheduler):
    """As Lightning lays a checkpoint out, with a module that has ``self.model``.

    ``dump_checkpoint`` in src/lightning/pytorch/trainer/connectors of
    https://github.com/Lightning-AI/pytorch-lightning/tree/030149055683ad7cda7d249c510edfb12deacc54
    """
    checkpoint = {
        "epoch": 1,
        "global_step": 10,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{k}": v for k, v in model.state_dict().items()},
        "loops": {
            f"{name}_loop": {"state_dict": {}}
            for name in ("fit", "validate", "test", "predict")
        },
        "callbacks": {},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [scheduler.state_dict()],
    }
    torch.save(checkpoint, "lightning.ckpt")


def write_transformers(model, optimizer, scheduler):
    """As the Trainer of transformers does: parameters with decay come first.

    ``create_optimizer`` and ``_save_optimizer_and_scheduler`` in
    https://github.com/huggingface/transformers/blob/main/src/transformers/trainer.py
    """
    named = dict(model.named_parameters())
    decayed = [name for name in named if not name.endswith("bias")]
    groups = [
        {"params": [named[n] for n in decayed], "weight_decay": 0.0},
        {"params": [named[n] for n in named if n not in decayed], "weight_decay": 0.0},
    ]
    trainer = torch.optim.RMSprop(groups, lr=0.01, momentum=0.9)
    for p in named.values():
        trainer.state[p] = optimizer.state[p]
    schedule = torch.optim.lr_scheduler.LambdaLR(trainer, lambda step: 1 - step / 100)
    folder = pathlib.Path("checkpoint-10")
    folder.mkdir()
    torch.save(trainer.state_dict(), folder / "optimizer.pt")
    torch.save(schedule.state_dict(), folder / "scheduler.pt")


def write_stable_baselines3(model, optimizer, scheduler):
    """As stable-baselines3 2.9.2 writes it, with its own class.

    ``save_to_zip_file`` in stable_baselines3/common/save_util.py of
    https://github.com/DLR-RM/stable-baselines3
    """
    own = stable_baselines3.RMSpropTFLike(model.parameters(), momentum=0.9)
    for p in model.parameters():
        own.state[p] = {**optimizer.state[p], "step": 10}
    with zipfile.ZipFile("a2c.zip", "w") as archive:
        archive.writestr("data", "{}")
        with archive.open("policy.pth", "w", force_zip64=True) as file:
            torch.save(model.state_dict(), file)
        with archive.open("policy.optimizer.pth", "w", force_zip64=True) as file:
            torch.save(own.state_dict(), file)
        archive.writestr("_stable_baselines3_version", "2.9.2")


def stored(optimizer, slot):
    """A slot of all parameters, in the order of the model."""
    (params,) = (group["params"] for group in optimizer.param_groups)
    return {n: optimizer.state[p][slot] for n, p in zip(ORDER, params, strict=True)}


def test_page(tmp_path, monkeypatch, capsys):
    """Every file gives the same state. Ten steps are the same in PyTorch and JAX."""
    monkeypatch.chdir(tmp_path)
    # The code for other layouts needs the optimizer before the way back replaces it.
    pages = (f"continue_from_torch{page}.md" for page in ("", "_files", "_back"))
    text = "".join((DOCS / page).read_text() for page in pages)
    saved, *blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    scope = {}
    exec(compile(saved, "<page>", "exec"), scope)
    model, optimizer, scheduler = (
        scope[name] for name in ("model", "optimizer", "scheduler")
    )
    for write in (write_lightning, write_transformers, write_stable_baselines3):
        write(model, optimizer, scheduler)
    expected = {
        slot: jax.tree.map(np.asarray, _convert(stored(optimizer, slot)))
        for slot in ("square_avg", "momentum_buffer")
    }
    compared = 0
    with jax.numpy_dtype_promotion("standard"):  # as it is for a reader
        for block in blocks:
            exec(compile(block, "<page>", "exec"), scope)
            if "import_state(" in block and "export_state(" not in block:
                rms, trace, schedule = scope["state"]
                jax.tree.map(
                    np.testing.assert_array_equal, rms.nu, expected["square_avg"]
                )
                jax.tree.map(
                    np.testing.assert_array_equal,
                    trace.trace,
                    expected["momentum_buffer"],
                )
                assert schedule.count == 10
                compared += 1
    assert compared == 6
    assert (
        capsys.readouterr().out
        == re.search(r"^```text\n(.*?)^```", text, re.M | re.S)[1]
    )

    # The page has trained ten steps from the checkpoint and exported them.
    for _ in range(10):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss
        loss(model(scope["inputs"]), scope["targets"]).backward()
        optimizer.step()
        scheduler.step()
    exported = scope["exported"]
    start = scope["convert"](scope["checkpoint"]["model"])
    theirs = scope["convert"]({n: p.detach() for n, p in model.named_parameters()})
    for ours, other, first in zip(
        *map(jax.tree.leaves, (scope["params"], theirs, start)), strict=True
    ):
        path = np.max(np.abs(other - first))
        assert path > 1e-3
        # Ten steps with their own rounding, which the gradients pass on.
        np.testing.assert_allclose(ours, other, rtol=0, atol=BOUND * path)
    rate = optimizer.param_groups[0]["lr"]
    np.testing.assert_allclose(exported["param_groups"][0]["lr"], rate, rtol=1e-6)
    assert float(exported["state"][0]["step"]) == 20


def _convert(arrays):
    return {
        name: {
            "kernel": arrays[f"{key}.weight"].numpy().T,
            "bias": arrays[f"{key}.bias"].numpy(),
        }
        for name, key in (("hidden", "0"), ("out", "2"))
    }
