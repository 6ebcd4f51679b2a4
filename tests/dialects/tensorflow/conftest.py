# SPDX-License-Identifier: Apache-2.0
"""A script among the tests, which only imports where TensorFlow is installed."""

collect_ignore = ["record_tensorflow.py"]
