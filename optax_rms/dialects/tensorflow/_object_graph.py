# SPDX-License-Identifier: Apache-2.0
"""The names of variables, from the object graph inside a checkpoint of TensorFlow.

``tf.train.Checkpoint`` names an array by its path from the root, for example
``optimizer/_variables/5``, and stores beside the arrays a graph that knows the name of
the variable, ``velocity/hidden/kernel``. The graph is a message of protocol buffers::

    TrackableObjectGraph: repeated TrackableObject nodes = 1
    TrackableObject:      repeated SerializedTensor attributes = 2
    SerializedTensor:     string full_name = 2, string checkpoint_key = 3

References:
  TensorFlow, trackable_object_graph.proto,
  https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/protobuf/trackable_object_graph.proto
  Protocol buffers, encoding, https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

# The name of the graph among the names of the arrays.
KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"

_NODES, _ATTRIBUTES, _FULL_NAME, _CHECKPOINT_KEY = 1, 2, 2, 3
# How a field is stored, by the lowest three bits of its tag.
_VARINT, _LENGTH_DELIMITED = 0, 2


def variable_names(variables: Mapping[str, Any]) -> dict[str, str]:
    """The name of the variable in each array of a checkpoint; empty without a graph."""
    if KEY not in variables:
        return {}
    graph = np.asarray(variables[KEY]).item()
    try:
        return {
            _text(attribute, _CHECKPOINT_KEY): _text(attribute, _FULL_NAME)
            for node in _submessages(graph, _NODES)
            for attribute in _submessages(node, _ATTRIBUTES)
        }
    except (TypeError, ValueError) as error:
        raise ValueError(f"{KEY} is damaged: {error}") from error


def _text(message: bytes, number: int) -> str:
    return b"".join(_submessages(message, number)).decode()


def _submessages(message: bytes, number: int) -> Iterator[bytes]:
    """The length-delimited fields of that number."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        value, position = _varint(message, position)
        if tag & 7 == _LENGTH_DELIMITED:
            if tag >> 3 == number:
                yield message[position : position + value]
            position += value
        elif tag & 7 != _VARINT:
            raise ValueError(f"a field of wire type {tag & 7} at byte {position}")


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """An integer, seven bits per byte, lowest first; and the position after it."""
    value = shift = 0
    while True:
        # NumPy drops zeros at the end of bytes.
        byte = message[position] if position < len(message) else 0
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        # The highest bit says that another byte follows.
        if byte < 0x80:
            return value, position
