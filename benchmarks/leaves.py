# SPDX-License-Identifier: Apache-2.0
"""The shapes of the parameters that the optimizers are run on."""

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """Kernels in the layout of Flax, scale and shift of each norm, and the head.

    He, Zhang, Ren and Sun, 2015, table 1, https://arxiv.org/abs/1512.03385
    """

    def convolution(size: int, channels: int, features: int) -> Shapes:
        return [(size, size, channels, features), (features,), (features,)]

    shapes = convolution(7, 3, 64)
    channels = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += convolution(1, channels, width)
            shapes += convolution(3, width, width)
            shapes += convolution(1, width, 4 * width)
            if block == 0:
                shapes += convolution(1, channels, 4 * width)
            channels = 4 * width
    return [*shapes, (channels, 1000), (1000,)]


def gpt2() -> Shapes:
    """The smallest GPT-2; the output layer shares the embedding.

    Radford, Wu, Child, Luan, Amodei and Sutskever, 2019, table 2, "Language Models are
    Unsupervised Multitask Learners"
    """
    width = 768
    norm = [(width,), (width,)]
    block = [
        *norm,
        (width, 3 * width),
        (3 * width,),
        (width, width),
        (width,),
        *norm,
        (width, 4 * width),
        (4 * width,),
        (4 * width, width),
        (width,),
    ]
    return [(50257, width), (1024, width), *12 * block, *norm]


def llama() -> Shapes:
    """LLaMA 7B, with kernels of inputs by outputs.

    Touvron et al., 2023, section 2.2 and table 2, https://arxiv.org/abs/2302.13971
    """
    width, hidden, words = 4096, 11008, 32000
    attention = 4 * [(width, width)]
    feed_forward = [*2 * [(width, hidden)], (hidden, width)]
    block = [(width,), *attention, (width,), *feed_forward]
    return [(words, width), *32 * block, (width,), (width, words)]


def equal_shapes(count: int, total: int) -> Shapes:
    """Vectors of one shape, with about ``total`` elements together."""
    return count * [(total // count,)]


def distinct_shapes(count: int, total: int) -> Shapes:
    """Vectors of distinct shapes, with about ``total`` elements together."""
    return [(total // count - count // 2 + i,) for i in range(count)]


LEAF_SETS = {
    "one leaf of 16M": [(4096, 4096)],
    "ResNet-50": resnet50(),
    "GPT-2 124M": gpt2(),
    "1,000 leaves of 8k": 1000 * [(8192,)],
}
QUICK_LEAF_SETS = {
    "one leaf of 1M": [(1024, 1024)],
    "20 leaves of 8k": 20 * [(8192,)],
}
