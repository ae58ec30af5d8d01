"""The global parameters before the first round, made piece by piece.

No device ever holds the whole network, and each kind of block compiles once.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resist_jax.models.blocks import Block, Branch
from resist_jax.models.resnet import ResNet

PyTree = Any


def initial_params(
  network: ResNet, image_shape: tuple[int, ...], seed: int
) -> dict[str, PyTree]:
  """Draws parameters; those of a piece depend on the seed and its place alone.

  Args:
    network: The global network.
    image_shape: `(H, W, C)`.
    seed: Of the run.

  Returns:
    Canonical global parameters by name, chains `[L, ...]`, on the host.
  """
  x: Any = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  drawn: dict[str, list[PyTree]] = {}
  stacked = set()
  # One module per name: JAX takes another one for another program.
  modules = {name: network.make_piece(name) for name, _ in network.pieces()}
  # It runs once: on CPU, compile it fast rather than well.
  options = {'xla_backend_optimization_level': 0} if network.for_cpu else None
  init = jax.jit(_init, static_argnums=0, compiler_options=options)
  for place, (name, block) in enumerate(network.pieces()):
    module = modules[name]
    scale = (jnp.ones(()),) if isinstance(module, Block | Branch) else ()
    key = jax.random.fold_in(jax.random.key(seed), place)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), x)
    variables = init(module, key, zeros, *scale)
    x = jax.eval_shape(module.apply, variables, x, *scale)
    x = x[0] if scale else x
    drawn.setdefault(name, []).append(jax.device_get(variables['params']))
    if block is not None:
      stacked.add(name)
  return {
    name: (
      jax.tree.map(lambda *blocks: np.stack(blocks), *parts)
      if name in stacked
      else parts[0]
    )
    for name, parts in drawn.items()
  }


def _init(module, key, *args):
  return module.init(key, *args)
