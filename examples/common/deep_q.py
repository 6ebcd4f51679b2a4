# SPDX-License-Identifier: Apache-2.0
"""Deep Q-learning on the games of MinAtar, several agents at once, as one program.

The agents take their steps together, so that the memory of all of them is written at
one index. A memory with an index per agent would be copied in each step.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import optax_rms

BATCH_SIZE = 32
CAPACITY = 100_000
DISCOUNT = 0.99
EPOCH_FRAMES = 5_000  # No episode of these games is longer.
EXPLORATION_FRAMES = 20_000
FIRST_FRAMES = 5_000
FRAMES_PER_TARGET = 1_000
FRAMES_PER_UPDATE = 4
LAST_EXPLORATION = 0.1


class Memory(NamedTuple):
    """The last frames in a ring, each array `[CAPACITY, agents, ...]`.

    Attributes:
      observation: before the action, eight pixels in a byte.
      action: numbers of the actions, int8.
      reward: float32.
      ended: whether the episode ended with this action.
    """

    observation: jax.Array
    action: jax.Array
    reward: jax.Array
    ended: jax.Array


class Agents(NamedTuple):
    """Several agents, which play at the same time.

    All arrays but `frame` and those of `memory` are `[agents, ...]`.

    Attributes:
      frame: number of frames that each has played.
      params: weights of the network.
      opt_states: of the optimizer of each rule.
      game: state of the environment.
      observation: before the next action, as in `Memory`.
      episode_return: sum of the rewards in this episode.
      memory: see `Memory`.
    """

    frame: jax.Array
    params: Any
    opt_states: list[Any]
    game: Any
    observation: jax.Array
    episode_return: jax.Array
    memory: Memory


class Batch(NamedTuple):
    """Frames for an update, `[BATCH_SIZE, ...]`."""

    observation: jax.Array
    action: jax.Array
    reward: jax.Array
    ended: jax.Array
    next_observation: jax.Array


class Network(nn.Module):
    """Values of the actions from packed observations.

    The network of MinAtar's DQN has a stride of 1 and 128 hidden units. A stride of 2
    and 64 units take a quarter of the arithmetic.
    """

    shape: tuple[int, int, int]
    num_actions: int

    @nn.compact
    def __call__(self, packed: jax.Array) -> jax.Array:
        bits = jnp.unpackbits(packed, axis=-1, count=int(np.prod(self.shape)))
        pixels = bits.reshape(-1, *self.shape).astype(jnp.float32)
        height, width, _ = self.shape
        padded = jnp.pad(pixels, ((0, 0), (0, 1), (0, 1), (0, 0)))
        # As a product of matrices: a convolution with weights per seed is slow.
        patches = [
            padded[:, i : i + height : 2, j : j + width : 2]
            for i in range(3)
            for j in range(3)
        ]
        filtered = nn.relu(nn.Dense(16)(jnp.concatenate(patches, axis=-1)))
        hidden = nn.relu(nn.Dense(64)(filtered.reshape(len(filtered), -1)))
        values = nn.Dense(self.num_actions)(hidden)
        return values.reshape(*packed.shape[:-1], self.num_actions)


class Rule(NamedTuple):
    """The way to take a step.

    Attributes:
      optimizer: from gradients to updates.
      loss_scale: of the sum of the losses of a batch.
      eps: the optimizer's.
      eps_in_sqrt: whether `eps` is inside of the root.
    """

    optimizer: optax.GradientTransformation
    loss_scale: float
    eps: float
    eps_in_sqrt: bool


class Trainer:
    """Plays, remembers and learns, with an agent for each rule and seed.

    Args:
      environment: of gymnax, with observations of zeros and ones.
      parameters: of the environment.
      rules: the ways to take a step.
      num_seeds: number of seeds of weights, games and batches.
    """

    def __init__(
        self, environment: Any, parameters: Any, rules: list[Rule], num_seeds: int
    ) -> None:
        self.environment = environment
        self.parameters = parameters
        self.rules = rules
        self.num_seeds = num_seeds
        self.seeds = jnp.tile(jnp.arange(num_seeds, dtype=jnp.uint32), len(rules))
        shape = environment.observation_space(parameters).shape
        self.network: Any = Network(shape, environment.num_actions)

    @partial(jax.jit, static_argnums=0)
    def start(self) -> Agents:
        """Agents with new weights and a memory of random actions."""

        def begin(seed: jax.Array) -> Any:
            weights_key, game_key = jax.random.split(jax.random.key(seed))
            observation, game = self.environment.reset(game_key, self.parameters)
            observation = pack(observation)
            return self.network.init(weights_key, observation), game, observation

        params, game, observation = jax.vmap(begin)(self.seeds)
        opt_states = [
            jax.vmap(rule.optimizer.init)(self._of_rule(i, params))
            for i, rule in enumerate(self.rules)
        ]
        lines = CAPACITY, len(self.seeds)
        memory = Memory(
            jnp.zeros((CAPACITY, *observation.shape), jnp.uint8),
            jnp.zeros(lines, jnp.int8),
            jnp.zeros(lines),
            jnp.zeros(lines, bool),
        )
        returns = jnp.zeros(len(self.seeds))
        frame = jnp.int32(0)
        agents = Agents(frame, params, opt_states, game, observation, returns, memory)
        return jax.lax.scan(lambda a, _: self._play(a), agents, None, FIRST_FRAMES)[0]

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def epoch(self, agents: Agents) -> tuple[Agents, dict[str, jax.Array]]:
        """Trains for `EPOCH_FRAMES` frames.

        Args:
          agents: their arrays are overwritten.

        Returns:
          The agents, and the metrics, `[rules, seeds]`: `return`, the mean over the
          episodes that ended; `loss`, the mean over all batches; `ruled_by_eps`, the
          share of weights at the end, as in `optax_rms.step_report`.
        """

        def update(target, agents, _) -> Any:
            agents, played = jax.lax.scan(
                lambda a, _: self._play(a), agents, None, FRAMES_PER_UPDATE
            )
            losses, _, updates, opt_states = self._step(agents, target)
            params = optax.apply_updates(agents.params, updates)
            agents = agents._replace(params=params, opt_states=opt_states)
            return agents, (losses, *(x.sum(0) for x in played))

        def until_new_target(agents, _) -> Any:
            num_updates = FRAMES_PER_TARGET // FRAMES_PER_UPDATE
            agents, found = jax.lax.scan(
                partial(update, agents.params), agents, None, num_updates
            )
            return agents, jax.tree.map(lambda x: x.sum(0), found)

        agents, found = jax.lax.scan(
            until_new_target, agents, None, EPOCH_FRAMES // FRAMES_PER_TARGET
        )
        losses, returns, ended = (x.sum(0) for x in found)
        num_updates = EPOCH_FRAMES // FRAMES_PER_UPDATE
        metrics = {
            "return": returns / ended,
            "loss": losses / (num_updates * BATCH_SIZE),
            "ruled_by_eps": self._ruled_by_eps(agents),
        }
        shape = len(self.rules), self.num_seeds
        return agents, {name: x.reshape(shape) for name, x in metrics.items()}

    def _step(self, agents: Agents, target: Any) -> Any:
        """The losses, the gradients, the updates and the new states of optimizers."""
        losses, sums = jax.vmap(jax.value_and_grad(self.loss))(
            agents.params, target, self.sample(agents)
        )
        gradients, updates, opt_states = [], [], []
        for i, rule in enumerate(self.rules):
            scaled = jax.tree.map(
                lambda g, scale=rule.loss_scale: scale * g, self._of_rule(i, sums)
            )
            changes, opt_state = jax.vmap(rule.optimizer.update)(
                scaled, agents.opt_states[i], self._of_rule(i, agents.params)
            )
            gradients.append(scaled)
            updates.append(changes)
            opt_states.append(opt_state)
        joined = jax.tree.map(lambda *x: jnp.concatenate(x), *updates)
        return losses, (gradients, updates), joined, opt_states

    def _ruled_by_eps(self, agents: Agents) -> jax.Array:
        """By a report on one more step, which is not taken."""
        _, (gradients, updates), _, opt_states = self._step(agents, agents.params)
        shares = []
        for i, rule in enumerate(self.rules):
            report = jax.vmap(
                partial(
                    optax_rms.step_report, eps=rule.eps, eps_in_sqrt=rule.eps_in_sqrt
                )
            )(gradients[i], updates[i], self._of_rule(i, agents.params), opt_states[i])
            assert report.ruled_by_eps is not None
            shares.append(report.ruled_by_eps.sum(-1) / report.live.sum(-1))
        return jnp.concatenate(shares)

    def _of_rule(self, i: int, tree: Any) -> Any:
        return jax.tree.map(
            lambda x: x[i * self.num_seeds : (i + 1) * self.num_seeds], tree
        )

    def loss(self, params: Any, target: Any, batch: Batch) -> jax.Array:
        """The sum of half the squared errors of a batch, with clipped gradients.

        Args:
          params: weights of the network.
          target: weights of the network that values the next observation.
          batch: of one agent.
        """
        next_values = self.network.apply(target, batch.next_observation).max(-1)
        expected = batch.reward + DISCOUNT * jnp.where(batch.ended, 0.0, next_values)
        values = self.network.apply(params, batch.observation)
        actions = batch.action[:, None].astype(jnp.int32)
        value = jnp.take_along_axis(values, actions, axis=-1)[:, 0]
        return optax.losses.huber_loss(value, expected).sum()

    def sample(self, agents: Agents) -> Batch:
        """Frames of the memory at random, the same for all agents of a seed.

        The newest frame is left out, as the next observation is not in the memory yet.
        """
        memory, newest = agents.memory, agents.frame - 1
        num_frames = jnp.minimum(newest, CAPACITY - 1)

        def ages(seed: jax.Array) -> jax.Array:
            draws = jax.random.uniform(_key(seed, agents.frame, use=1), (BATCH_SIZE,))
            return 1 + jnp.floor(draws * num_frames).astype(jnp.int32)

        index = (newest - jax.vmap(ages)(self.seeds)) % CAPACITY
        agent = jnp.arange(len(self.seeds))[:, None]
        return Batch(
            memory.observation[index, agent],
            memory.action[index, agent],
            memory.reward[index, agent],
            memory.ended[index, agent],
            memory.observation[(index + 1) % CAPACITY, agent],
        )

    def _play(self, agents: Agents) -> tuple[Agents, tuple[jax.Array, jax.Array]]:
        """One frame; also the returns of the episodes that ended, and which did."""
        share = (agents.frame - FIRST_FRAMES) / EXPLORATION_FRAMES
        exploration = jnp.clip(1 - (1 - LAST_EXPLORATION) * share, LAST_EXPLORATION, 1)

        def act(seed, params, game, observation) -> Any:
            game_key, key = jax.random.split(_key(seed, agents.frame, use=0))
            explore, other = jax.random.uniform(key, (2,))
            best = self.network.apply(params, observation).argmax()
            other = jnp.floor(other * self.network.num_actions)
            action = jnp.where(explore < exploration, other, best).astype(jnp.int32)
            observation, game, reward, terminated, truncated, _ = self.environment.step(
                game_key, game, action, self.parameters
            )
            ended = terminated | truncated
            return game, pack(observation), action.astype(jnp.int8), reward, ended

        game, observation, action, reward, ended = jax.vmap(act)(
            self.seeds, agents.params, agents.game, agents.observation
        )
        frame = Memory(agents.observation, action, reward, ended)
        memory = jax.tree.map(
            lambda array, x: jax.lax.dynamic_update_index_in_dim(
                array, x, agents.frame % CAPACITY, axis=0
            ),
            agents.memory,
            frame,
        )
        episode_return = agents.episode_return + reward
        agents = agents._replace(
            frame=agents.frame + 1,
            game=game,
            observation=observation,
            episode_return=jnp.where(ended, 0.0, episode_return),
            memory=memory,
        )
        return agents, (jnp.where(ended, episode_return, 0.0), ended)


def pack(observation: jax.Array) -> jax.Array:
    return jnp.packbits(observation.ravel().astype(bool))


def _key(seed: jax.Array, frame: jax.Array, use: int) -> jax.Array:
    """The random key of a frame. A run that resumes draws the same numbers."""
    return jax.random.fold_in(jax.random.key(seed), 2 * frame + use)
