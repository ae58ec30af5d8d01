r"""The language model as a run of the command line; its card names this module.

  python -m resist_jax --workdir=runs/language \
    --config=experiments/configs/language.py

It has checkpoints, processes, faults and reports as any run does. The field
`data.name` says which text; see `text.load`.
"""

from typing import Any

import numpy as np
import optax

from experiments import gpt, text
from experiments.transformer import BLOCKS, Shape
from resist_jax import data as data_lib
from resist_jax.run.module_task import Network, rescaled_blocks

# The last layers of the two branches of a block.
_LAST = ('Dense_1/', 'MultiHeadDotProductAttention_0/out/')


def _shape(config: Any) -> Shape:
  options = config.model.options
  return Shape(options.layers, options.width, options.heads, options.length)


def network(config: Any) -> Network:
  """Returns the GPT, whose blocks ResIST cuts."""
  shape = _shape(config)
  return Network(lambda seed: gpt.init(shape, seed), (BLOCKS,))


def loss(config: Any) -> Any:
  """Returns the loss in nats a byte."""
  return gpt.make_loss(_shape(config))


def data(config: Any) -> data_lib.Tables:
  """Cuts a text into windows; tests take the first `test_windows` of theirs."""
  options = config.model.options
  train, test = (
    _windows(part, options.length)
    for part in text.load(config.data.name, config.data.dir)
  )
  tests = {'test': test[: options.test_windows]}
  return data_lib.from_tables(train, tests, config.data.name, 'windows')


def _windows(part: np.ndarray, length: int) -> np.ndarray:
  """Returns `int32[n, length + 1]`; the last byte of one begins the next."""
  starts = np.arange(0, len(part) - length, length)
  return part[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def optimizer(
  config: Any, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Returns AdamW behind a limit on the norm of gradients."""
  decay = config.optimizer.weight_decay
  return optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=decay)
  )


def rescale(config: Any, params: Any, factors: dict[str, float]) -> Any:
  """Multiplies the branches of all blocks by their last layers."""
  del config
  return rescaled_blocks(params, factors, lambda name: name.startswith(_LAST))
