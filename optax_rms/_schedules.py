# SPDX-License-Identifier: Apache-2.0
"""The one place where a learning rate is a number, an array or a schedule."""
