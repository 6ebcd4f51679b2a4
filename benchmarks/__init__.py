# SPDX-License-Identifier: Apache-2.0
"""Measurements beside the peers; results are kept as JSON in `benchmarks/results`."""
