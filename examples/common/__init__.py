# SPDX-License-Identifier: Apache-2.0
"""Data, networks, pictures and command lines that the example programs share."""
