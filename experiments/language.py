"""A language model cut among workers: ResIST, local SGD, DiLoCo, data parallel.

  python -m experiments.language                       # All cells.
  python -m experiments.language --only=resist_s4 --seeds=0
  python -m experiments.language --text=FILE           # Or tfds:NAME.

A GPT on bytes learns Python's standard library, or any text. All protocols take
the same number of steps on every worker, with AdamW and clipped gradients. A
run that is stopped goes on where it was.
"""

import argparse
from collections.abc import Iterator
import dataclasses
import functools
import json
import pathlib
import shutil
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import gpt, text
from experiments.runs import RESULTS, provenance, write_record
import resist_jax as resist
from resist_jax import accounting
from resist_jax.errors import ConfigError

PROTOCOLS = (
  'resist',
  'resist_training_scale',
  'resist_outer',
  'local_sgd',
  'diloco',
  'data_parallel',
)
OUTER = optax.sgd(0.7, momentum=0.9, nesterov=True)
TEST_WINDOWS = 256


@dataclasses.dataclass(frozen=True)
class Scale:
  """How large a run is.

  Attributes:
    shape: Sizes of the network.
    batch: Windows of a worker in a step.
    local_steps: T.
    rounds: Rounds of a run.
    rate: Learning rate after the warm-up; it falls to a tenth by a cosine.
    test_every: Rounds between tests.
  """

  shape: gpt.Shape
  batch: int
  local_steps: int
  rounds: int
  rate: float = 1e-3
  test_every: int = 5


SCALES = {
  'smoke': Scale(gpt.Shape(8, 16, 2, 16), 2, 2, 3, test_every=1),
  'cpu': Scale(gpt.Shape(8, 128, 4, 64), 8, 20, 100),
}


def make_trainer(protocol: str, S: int, scale: Scale, seed: int):
  """Returns the trainer of a protocol, and the scale of blocks in tests.

  Args:
    protocol: One of `PROTOCOLS`.
    S: Workers.
    scale: How large the run is.
    seed: Of assignments.

  Returns:
    `(trainer, test_scale)`.
  """
  steps = scale.rounds * scale.local_steps
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, scale.rate, steps // 20, steps, scale.rate / 10
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1)
  )
  cut = protocol.startswith('resist')
  in_training = S if protocol == 'resist_training_scale' else 1.0
  trainer = resist.Trainer(
    gpt.make_loss(scale.shape, in_training),
    optimizer,
    num_workers=S,
    local_steps=scale.local_steps,
    chains=(gpt.BLOCKS,) if cut else (),
    seed=seed,
    average_gradients=protocol == 'data_parallel',
    carry=protocol == 'data_parallel',
    outer=OUTER if protocol in ('diloco', 'resist_outer') else None,
  )
  share = 1 / S if cut and in_training == 1 else 1.0
  return trainer, share


@functools.partial(jax.jit, static_argnums=(2, 3))
def _test_loss(params, windows, heads, test_scale):
  scales = jnp.full(len(jax.tree.leaves(params[gpt.BLOCKS])[0]), test_scale)

  def one(batch):
    found = gpt.logits(params, scales, batch[:, :-1], heads)
    return optax.softmax_cross_entropy_with_integer_labels(
      found, batch[:, 1:]
    ).mean()

  return jax.lax.map(one, windows).mean()


def run(
  protocol: str,
  S: int,
  scale: Scale,
  seed: int,
  texts: tuple[np.ndarray, np.ndarray],
  folder: pathlib.Path,
) -> list[dict[str, Any]]:
  """Trains a run, or continues it.

  Args:
    protocol: One of `PROTOCOLS`.
    S: Workers.
    scale: How large the run is.
    seed: Of parameters, batches and assignments.
    texts: `(train, test)`.
    folder: Where its state is saved after each test.

  Returns:
    A row for each test: round, steps, bytes, seconds of training, and the loss
    on the test text in nats a byte.
  """
  train, test = texts
  shape = scale.shape
  trainer, test_scale = make_trainer(protocol, S, scale, seed)
  log = folder / 'rows.json'
  rows: list[dict[str, Any]] = []
  if log.exists():
    rows, state = json.loads(log.read_text()), trainer.restore(folder)
  else:
    state = trainer.init(gpt.init(shape, seed))
  windows = text.batch(test, (8, TEST_WINDOWS // 8), shape.length, [seed, 1])
  sent = trainer.bytes_per_round(state)
  seconds = rows[-1]['seconds'] if rows else 0.0
  compiled = trainer.compile(state, _batches(train, S, scale, seed, 0))
  for index in range(int(state.round), scale.rounds):
    batches = _batches(train, S, scale, seed, index)
    since = time.perf_counter()
    state, metrics = compiled.round(state, batches)
    loss = float(np.asarray(metrics['loss']).mean())
    seconds += time.perf_counter() - since
    done = index + 1
    if done % scale.test_every and done != scale.rounds:
      continue
    tested = _test_loss(trainer.params(state), windows, shape.heads, test_scale)
    rows.append(
      {'round': done, 'steps': done * scale.local_steps, 'bytes': done * sent}
      | {'seconds': seconds, 'train_loss': loss, 'test_loss': float(tested)}
    )
    trainer.save(folder, state)
    log.write_text(json.dumps(rows))
    print(f'{protocol} S={S} seed {seed}: {rows[-1]}', file=sys.stderr)
  return rows


def _batches(train, S, scale: Scale, seed: int, index: int) -> np.ndarray:
  shape = (S, scale.local_steps, scale.batch)
  return text.batch(train, shape, scale.shape.length, [seed, 2, index])


def cells(only: str) -> Iterator[tuple[str, int]]:
  """Yields protocols and numbers of workers, the most asked for first."""
  for S in (4, 2, 8):
    for protocol in PROTOCOLS:
      if not only or f'{protocol}_s{S}' in only.split(','):
        yield protocol, S


def main() -> int:
  """Runs the experiment."""
  parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('--scale', choices=SCALES, default='cpu')
  parser.add_argument('--only', default='', help='such as resist_s4,diloco_s4')
  parser.add_argument('--seeds', default='0,1', help='separated by commas')
  parser.add_argument('--text', default=text.SOURCES, help='see above')
  parser.add_argument('--data_dir', default='', help='of prepared TFDS sets')
  parser.add_argument('--workdir', default='runs/language', help='of the runs')
  options = parser.parse_args()
  jax.config.update('jax_num_cpu_devices', 1)
  try:
    texts = text.load(options.text, options.data_dir)
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  scale = SCALES[options.scale]
  for seed in map(int, options.seeds.split(',')):
    for protocol, S in cells(options.only):
      name = f'{protocol}_s{S}_seed{seed}'
      target = RESULTS / 'language' / options.scale / f'{name}.json'
      if target.exists():
        continue
      folder = pathlib.Path(options.workdir) / options.scale / name
      folder.mkdir(parents=True, exist_ok=True)
      rows = run(protocol, S, scale, seed, texts, folder)
      write_record(target, _record(options, scale, protocol, S, seed, rows))
      shutil.rmtree(folder)
  return 0


def _record(options, scale: Scale, protocol, S, seed, rows) -> dict[str, Any]:
  params = gpt.init(scale.shape, seed)
  sizes = accounting.measure(params, [gpt.BLOCKS])
  return {
    'provenance': provenance(),
    'config': {
      'protocol': protocol,
      'num_workers': S,
      'seed': seed,
      'text': options.text,
      **dataclasses.asdict(scale),
      'shape': scale.shape._asdict(),
    },
    'params': sizes.total,
    'params_in_blocks': sizes.total - sizes.shared,
    'test_loss': rows[-1]['test_loss'],
    'curve': rows,
  }


if __name__ == '__main__':
  sys.exit(main())
