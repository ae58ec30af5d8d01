"""A language model cut among workers: ResIST, local SGD, DiLoCo, data parallel.

  python -m experiments.language                       # All cells.
  python -m experiments.language --only=resist_s4 --seeds=1
  python -m experiments.language --text=FILE           # Or tfds:NAME.

A GPT on bytes learns Python's standard library, or any text. `protocols` trains
it, and `protocols_report` shows the results.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import gpt, protocols, text
from experiments.protocols import Budget, Task
from experiments.transformer import BLOCKS, Shape

TEST_WINDOWS = 512
SCALES = {
  'smoke': (Shape(8, 16, 2, 16), Budget(2, 2, 3, 1e-3, test_every=1)),
  'cpu': (Shape(8, 48, 4, 48), Budget(4, 20, 25, 3e-3, test_every=5)),
}


@functools.partial(jax.jit, static_argnames='heads')
def _test_loss(params, windows, scale, heads):
  length = len(jax.tree.leaves(params[BLOCKS])[0])

  def one(batch):
    scales = jnp.full(length, scale)
    found = gpt.logits(params, scales, batch[:, :-1], heads)
    return optax.softmax_cross_entropy_with_integer_labels(
      found, batch[:, 1:]
    ).mean()

  return jax.lax.map(one, windows).mean()


def task(name: str, scale: str, texts: tuple[np.ndarray, np.ndarray]) -> Task:
  """Returns what `protocols` trains.

  Args:
    name: Name of the text.
    scale: A key of `SCALES`.
    texts: `(train, test)`.

  Returns:
    The task; its result is the loss on the test text in nats a byte.
  """
  shape, budget = SCALES[scale]
  train, test = texts
  windows = text.batch(test, (8, TEST_WINDOWS // 8), shape.length, [1])

  def batches(S, seed, index):
    each = (S, budget.local_steps, budget.batch)
    return text.batch(train, each, shape.length, [seed, 2, index])

  def tested(params, test_scale):
    found = _test_loss(params, windows, jnp.float32(test_scale), shape.heads)
    return {'test_loss': float(found)}

  return Task(
    name,
    budget,
    BLOCKS,
    functools.partial(gpt.init, shape),
    functools.partial(gpt.make_loss, shape),
    batches,
    tested,
    {'shape': shape._asdict(), 'text_bytes': len(train) + len(test)},
  )


def main() -> int:
  """Runs the experiment."""
  parser = protocols.parser(__doc__, list(SCALES))
  parser.add_argument(
    '--text',
    default=text.SOURCES,
    help='python, FILE or tfds:NAME (default: python)',
  )
  options = parser.parse_args()

  def load():
    texts = text.load(options.text, options.data_dir)
    return task(options.text, options.scale, texts)

  return protocols.main('language', options, load)


if __name__ == '__main__':
  sys.exit(main())
