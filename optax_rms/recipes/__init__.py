# SPDX-License-Identifier: Apache-2.0
"""Published settings of RMSProp: source, dialect, loss, and what is disputed.

Every number was read in the code that the docstring names, with its commit. Numbers of
a paper are from a transcription of its text, unless the docstring names another source.

An epsilon, like a bound on gradients, has the scale of the gradients. Each recipe
therefore says whether the loss is a sum or a mean over the batch: with a mean over 32
samples, gradients are 32 times smaller than with a sum. The page "All recipes" has
all recipes in one table. `cite` returns the BibTeX entries of a recipe.
"""

from optax_rms.recipes._citations import cite
from optax_rms.recipes._generative import biggan, stylegan2, wgan
from optax_rms.recipes._laprop import dreamer_v3, laprop
from optax_rms.recipes._physics import netket, pennylane
from optax_rms.recipes._reinforcement_learning import (
    a2c,
    a2c_stable_baselines3,
    a3c,
    dqn,
    dqn_dopamine,
    dqn_minatar,
    dqn_zoo,
    impala,
    impala_cleanba,
    impala_torchbeast,
)
from optax_rms.recipes._sequences import char_rnn, graves_handwriting
from optax_rms.recipes._vision import (
    efficientnet,
    inception_v3,
    mnasnet,
    mobilenet_v3,
)

__all__ = [
    "a2c",
    "a2c_stable_baselines3",
    "a3c",
    "biggan",
    "char_rnn",
    "cite",
    "dqn",
    "dqn_dopamine",
    "dqn_minatar",
    "dqn_zoo",
    "dreamer_v3",
    "efficientnet",
    "graves_handwriting",
    "impala",
    "impala_cleanba",
    "impala_torchbeast",
    "inception_v3",
    "laprop",
    "mnasnet",
    "mobilenet_v3",
    "netket",
    "pennylane",
    "stylegan2",
    "wgan",
]


def __dir__() -> list[str]:
    return __all__
