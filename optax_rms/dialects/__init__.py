# SPDX-License-Identifier: Apache-2.0
"""RMSProp of other frameworks, in their words; import and export of their states."""

from optax_rms.dialects import keras as keras
from optax_rms.dialects import optax as optax
from optax_rms.dialects import tensorflow as tensorflow
from optax_rms.dialects import torch as torch

__all__ = ["keras", "optax", "tensorflow", "torch"]
