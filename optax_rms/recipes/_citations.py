# SPDX-License-Identifier: Apache-2.0
"""BibTeX entries of the papers and programs behind the recipes."""

import re
from collections.abc import Callable
from typing import Any

from optax_rms.recipes import _generative as generative
from optax_rms.recipes import _laprop, _physics, _sequences, _vision
from optax_rms.recipes import _reinforcement_learning as learning

_ENTRIES = r"""
@article{mnih2015human,
  title = {Human-level control through deep reinforcement learning},
  author = {Mnih, Volodymyr and Kavukcuoglu, Koray and Silver, David and others},
  journal = {Nature},
  volume = {518},
  pages = {529--533},
  year = {2015},
  doi = {10.1038/nature14236}
}

@software{quan2020dqnzoo,
  title = {{DQN} {Zoo}: Reference implementations of {DQN}-based agents},
  author = {Quan, John and Ostrovski, Georg},
  year = {2020},
  url = {https://github.com/google-deepmind/dqn_zoo}
}

@misc{castro2018dopamine,
  title = {Dopamine: A Research Framework for Deep Reinforcement Learning},
  author = {Castro, Pablo Samuel and Moitra, Subhodeep and Gelada, Carles and
    Kumar, Saurabh and Bellemare, Marc G.},
  year = {2018},
  eprint = {1812.06110},
  archivePrefix = {arXiv}
}

@misc{young2019minatar,
  title = {{MinAtar}: An {Atari}-Inspired Testbed for Thorough and Reproducible
    Reinforcement Learning Experiments},
  author = {Young, Kenny and Tian, Tian},
  year = {2019},
  eprint = {1903.03176},
  archivePrefix = {arXiv}
}

@misc{espeholt2018impala,
  title = {{IMPALA}: Scalable Distributed Deep-{RL} with Importance Weighted
    Actor-Learner Architectures},
  author = {Espeholt, Lasse and Soyer, Hubert and Munos, Remi and Simonyan, Karen and
    Mnih, Volodymyr and Ward, Tom and Doron, Yotam and Firoiu, Vlad and Harley, Tim and
    Dunning, Iain and Legg, Shane and Kavukcuoglu, Koray},
  year = {2018},
  eprint = {1802.01561},
  archivePrefix = {arXiv}
}

@misc{kuttler2019torchbeast,
  title = {{TorchBeast}: A {PyTorch} Platform for Distributed {RL}},
  author = {K\"{u}ttler, Heinrich and Nardelli, Nantas and Lavril, Thibaut and
    Selvatici, Marco and Sivakumar, Viswanath and Rockt\"{a}schel, Tim and
    Grefenstette, Edward},
  year = {2019},
  eprint = {1910.03552},
  archivePrefix = {arXiv}
}

@misc{huang2023cleanba,
  title = {Cleanba: A Reproducible and Efficient Distributed Reinforcement Learning
    Platform},
  author = {Huang, Shengyi and Weng, Jiayi and Charakorn, Rujikorn and Lin, Min and
    Xu, Zhongwen and Onta{\~n}{\'o}n, Santiago},
  year = {2023},
  eprint = {2310.00036},
  archivePrefix = {arXiv}
}

@misc{mnih2016asynchronous,
  title = {Asynchronous Methods for Deep Reinforcement Learning},
  author = {Mnih, Volodymyr and Badia, Adri{\`a} Puigdom{\`e}nech and Mirza, Mehdi and
    Graves, Alex and Harley, Tim and Lillicrap, Timothy P. and Silver, David and
    Kavukcuoglu, Koray},
  year = {2016},
  eprint = {1602.01783},
  archivePrefix = {arXiv}
}

@misc{dhariwal2017baselines,
  title = {{OpenAI} {Baselines}},
  author = {Dhariwal, Prafulla and Hesse, Christopher and Klimov, Oleg and
    Nichol, Alex and Plappert, Matthias and Radford, Alec and Schulman, John and
    Sidor, Szymon and Wu, Yuhuai and Zhokhov, Peter},
  year = {2017},
  howpublished = {\url{https://github.com/openai/baselines}}
}

@article{raffin2021stable,
  title = {{Stable-Baselines3}: Reliable Reinforcement Learning Implementations},
  author = {Raffin, Antonin and Hill, Ashley and Gleave, Adam and Kanervisto, Anssi and
    Ernestus, Maximilian and Dormann, Noah},
  journal = {Journal of Machine Learning Research},
  volume = {22},
  number = {268},
  pages = {1--8},
  year = {2021},
  url = {https://jmlr.org/papers/v22/20-1364.html}
}

@misc{ziyin2020laprop,
  title = {{LaProp}: Separating Momentum and Adaptivity in {Adam}},
  author = {Ziyin, Liu and Wang, Zhikang T. and Ueda, Masahito},
  year = {2020},
  eprint = {2002.04839},
  archivePrefix = {arXiv}
}

@misc{hafner2023mastering,
  title = {Mastering Diverse Domains through World Models},
  author = {Hafner, Danijar and Pasukonis, Jurgis and Ba, Jimmy and
    Lillicrap, Timothy},
  year = {2023},
  eprint = {2301.04104},
  archivePrefix = {arXiv}
}

@misc{szegedy2015rethinking,
  title = {Rethinking the Inception Architecture for Computer Vision},
  author = {Szegedy, Christian and Vanhoucke, Vincent and Ioffe, Sergey and
    Shlens, Jonathon and Wojna, Zbigniew},
  year = {2015},
  eprint = {1512.00567},
  archivePrefix = {arXiv}
}

@misc{tan2019efficientnet,
  title = {{EfficientNet}: Rethinking Model Scaling for Convolutional Neural Networks},
  author = {Tan, Mingxing and Le, Quoc V.},
  year = {2019},
  eprint = {1905.11946},
  archivePrefix = {arXiv}
}

@misc{tan2018mnasnet,
  title = {{MnasNet}: Platform-Aware Neural Architecture Search for Mobile},
  author = {Tan, Mingxing and Chen, Bo and Pang, Ruoming and Vasudevan, Vijay and
    Sandler, Mark and Howard, Andrew and Le, Quoc V.},
  year = {2018},
  eprint = {1807.11626},
  archivePrefix = {arXiv}
}

@misc{howard2019searching,
  title = {Searching for {MobileNetV3}},
  author = {Howard, Andrew and Sandler, Mark and Chu, Grace and Chen, Liang-Chieh and
    Chen, Bo and Tan, Mingxing and Wang, Weijun and Zhu, Yukun and Pang, Ruoming and
    Vasudevan, Vijay and Le, Quoc V. and Adam, Hartwig},
  year = {2019},
  eprint = {1905.02244},
  archivePrefix = {arXiv}
}

@misc{graves2013generating,
  title = {Generating Sequences With Recurrent Neural Networks},
  author = {Graves, Alex},
  year = {2013},
  eprint = {1308.0850},
  archivePrefix = {arXiv}
}

@misc{karpathy2015unreasonable,
  title = {The Unreasonable Effectiveness of Recurrent Neural Networks},
  author = {Karpathy, Andrej},
  year = {2015},
  howpublished = {\url{https://karpathy.github.io/2015/05/21/rnn-effectiveness/}}
}

@misc{arjovsky2017wasserstein,
  title = {Wasserstein {GAN}},
  author = {Arjovsky, Martin and Chintala, Soumith and Bottou, L{\'e}on},
  year = {2017},
  eprint = {1701.07875},
  archivePrefix = {arXiv}
}

@misc{karras2020analyzing,
  title = {Analyzing and Improving the Image Quality of {StyleGAN}},
  author = {Karras, Tero and Laine, Samuli and Aittala, Miika and Hellsten, Janne and
    Lehtinen, Jaakko and Aila, Timo},
  year = {2020},
  eprint = {1912.04958},
  archivePrefix = {arXiv}
}

@misc{brock2019large,
  title = {Large Scale {GAN} Training for High Fidelity Natural Image Synthesis},
  author = {Brock, Andrew and Donahue, Jeff and Simonyan, Karen},
  year = {2019},
  eprint = {1809.11096},
  archivePrefix = {arXiv}
}

@article{vicentini2022netket,
  title = {{NetKet} 3: Machine Learning Toolbox for Many-Body Quantum Systems},
  author = {Vicentini, Filippo and others},
  journal = {SciPost Physics Codebases},
  pages = {7},
  year = {2022},
  doi = {10.21468/SciPostPhysCodeb.7}
}

@misc{bergholm2018pennylane,
  title = {{PennyLane}: Automatic differentiation of hybrid quantum-classical
    computations},
  author = {Bergholm, Ville and others},
  year = {2018},
  eprint = {1811.04968},
  archivePrefix = {arXiv}
}
"""

# By key, in the order above.
_BIBTEX = {
    match[1]: match[0].strip()
    for match in re.finditer(r"@\w+\{(\w+),.*?\n\}", _ENTRIES, re.DOTALL)
}

_KEYS: dict[Callable[..., Any], tuple[str, ...]] = {
    learning.dqn: ("mnih2015human",),
    learning.dqn_zoo: ("mnih2015human", "quan2020dqnzoo"),
    learning.dqn_dopamine: ("mnih2015human", "castro2018dopamine"),
    learning.dqn_minatar: ("mnih2015human", "young2019minatar"),
    learning.impala: ("espeholt2018impala",),
    learning.impala_torchbeast: ("espeholt2018impala", "kuttler2019torchbeast"),
    learning.impala_cleanba: ("espeholt2018impala", "huang2023cleanba"),
    learning.a3c: ("mnih2016asynchronous",),
    learning.a2c: ("mnih2016asynchronous", "dhariwal2017baselines"),
    learning.a2c_stable_baselines3: ("mnih2016asynchronous", "raffin2021stable"),
    _laprop.laprop: ("ziyin2020laprop",),
    _laprop.dreamer_v3: ("ziyin2020laprop", "hafner2023mastering"),
    _vision.inception_v3: ("szegedy2015rethinking",),
    _vision.efficientnet: ("tan2019efficientnet",),
    _vision.mnasnet: ("tan2018mnasnet",),
    _vision.mobilenet_v3: ("howard2019searching",),
    _sequences.graves_handwriting: ("graves2013generating",),
    _sequences.char_rnn: ("karpathy2015unreasonable",),
    generative.wgan: ("arjovsky2017wasserstein",),
    generative.stylegan2: ("karras2020analyzing",),
    generative.biggan: ("brock2019large",),
    _physics.netket: ("vicentini2022netket",),
    _physics.pennylane: ("bergholm2018pennylane",),
}


def cite(*recipes: Callable[..., Any]) -> str:
    """The BibTeX entries of recipes: the papers, and the programs if others wrote them.

    Args:
      *recipes: functions of this module, for example ``recipes.dqn``.

    Returns:
      The entries, separated by empty lines; an entry of several recipes occurs once.

    Raises:
      ValueError: an argument is no recipe.

    Example:
      >>> from optax_rms import recipes
      >>> print(recipes.cite(recipes.laprop))
      @misc{ziyin2020laprop,
        title = {{LaProp}: Separating Momentum and Adaptivity in {Adam}},
        author = {Ziyin, Liu and Wang, Zhikang T. and Ueda, Masahito},
        year = {2020},
        eprint = {2002.04839},
        archivePrefix = {arXiv}
      }
    """
    keys: list[str] = []
    for recipe in recipes:
        if recipe not in _KEYS:
            raise ValueError(
                f"cite needs functions of optax_rms.recipes, got {recipe!r}. Pass the "
                "function itself, for example recipes.cite(recipes.dqn)."
            )
        keys += _KEYS[recipe]
    return "\n\n".join(_BIBTEX[key] for key in dict.fromkeys(keys))
