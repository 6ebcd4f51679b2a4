# SPDX-License-Identifier: Apache-2.0
"""Code that several dialects share: clipping, and import and export of states."""
