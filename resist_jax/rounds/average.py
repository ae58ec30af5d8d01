"""An average of the global network over rounds, to test and to export.

It follows the rounds as an exponential moving average does, but without the
weight of its start: after the first round it is that round's network. Each
holder of a block keeps its average, which moves on with the block; the average
of the shared part is the same everywhere, so nobody sends it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resist_jax.exchange import collectives
from resist_jax.rounds.moments import Parts

PyTree = Any
LARGEST_DECAY = 0.999999  # In 32 bits, a little more would be 1.


def first(params: PyTree) -> Parts:
  """Returns the average before any round.

  Args:
    params: Global parameters, on the host.

  Returns:
    One moment of at least 32 bits, shaped as the parameters, in which small
    steps last; and how many rounds it has seen, `int32[]`.
  """
  return Parts([collectives.widen(params)], [np.int32(0)])


def step(
  decay: float, params: PyTree, parts: Parts, rounds: jax.Array
) -> Parts:
  """Returns the average with one more network.

  Args:
    decay: Weight of a round relative to that of the round after it.
    params: Parameters after the round, `[W, ...]`.
    parts: The average of the same parameters before it, see `State.average`.
    rounds: How many rounds were trained as one, `int32[]`. The network after
      them counts as that of each would.

  Returns:
    The new average.
  """
  (average,), (count,) = parts

  def one_worker(average, count, params):
    count = count + rounds
    kept = jnp.float32(decay)
    # Not every power of 1 gives the same bits.
    past = jnp.where(rounds == 1, kept, kept ** rounds.astype(jnp.float32))
    weight = (1 - past) / (1 - kept ** count.astype(jnp.float32))

    def towards(old, new):
      share = weight.astype(old.dtype)
      return (1 - share) * old + share * new

    new = jax.tree.map(towards, average, collectives.widen(params))
    return Parts([new], [count])

  return jax.vmap(one_worker)(average, count, params)
