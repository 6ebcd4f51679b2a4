# SPDX-License-Identifier: Apache-2.0
"""Measurements beside the peers; results are kept as JSON in `benchmarks/results`."""

import os

# All of this must be set before a framework is imported.
# A run of JAX and of PyTorch share the memory of a GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("KERAS_BACKEND", "jax")
# By default, PyTorch's threads spin while they wait. Spinning takes cores from the next
# side, and slows PyTorch down a hundred times beside another program.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Without this, a measured compilation may only load the result of an earlier run.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
