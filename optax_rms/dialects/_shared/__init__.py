# SPDX-License-Identifier: Apache-2.0
"""What the hand-overs of all frameworks share."""
