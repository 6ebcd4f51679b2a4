# SPDX-License-Identifier: Apache-2.0
"""RMSProp as other frameworks have it, in their words, and runs handed over."""

from optax_rms.dialects import keras as keras
from optax_rms.dialects import optax as optax
from optax_rms.dialects import tensorflow as tensorflow
from optax_rms.dialects import torch as torch
