# SPDX-License-Identifier: Apache-2.0
"""Scripts among the tests, which only import where TensorFlow is installed."""

collect_ignore = ["record_saved_files.py", "record_tensorflow.py"]
