"""What a checkpoint after every round costs, in rounds of about ten seconds.

  python -m experiments.checkpoint_cost

Rounds of the paper's ResNet101 on handwritten digits are timed with and without
a checkpoint after each, in turn. Saving goes on in the background during the
next round, so a turn ends when its last checkpoint is whole.
"""

from collections.abc import Iterator
import json
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import jax

from experiments.runs import (
  RESULTS,
  command,
  count,
  load_card,
  machine,
  parsed,
  provenance,
  read,
  write_record,
)
from experiments.table import Table
from resist_jax.errors import Parser
from resist_jax.run import restore
from resist_jax.run.checkpoint import Checkpoints
from resist_jax.run.checks import validate
from resist_jax.run.setup import prepare

RESULT = RESULTS / 'checkpoint_cost' / 'digits_resnet101.json'
FIELDS = {'model.name': 'PreActResNet101', 'batch_size': 32, 'local_steps': 3}


def timed(
  phase,
  pipeline,
  state,
  first: int,
  count: int,
  checkpoints: Checkpoints | None,
) -> tuple[Any, float, float]:
  """Trains some rounds.

  Args:
    phase: The compiled rounds.
    pipeline: Where batches come from.
    state: The state before.
    first: Index of the first round.
    count: How many rounds.
    checkpoints: Where each is saved; None for nowhere.

  Returns:
    The state after, the seconds of all rounds and checkpoints, and those of
    them in which the caller waited for `save`.
  """
  begin, waited = time.perf_counter(), 0.0
  for index in range(first, first + count):
    state, metrics = phase.trainer.round(state, pipeline.batches(index))
    jax.block_until_ready(metrics)
    if checkpoints:
      since = time.perf_counter()
      checkpoints.save(state, {'round': index + 1})
      waited += time.perf_counter() - since
  if checkpoints:
    checkpoints.finish()
  jax.block_until_ready(state)
  return state, time.perf_counter() - begin, waited


def tables() -> Iterator[Table]:
  """Yields what checkpoints cost, if it has been measured."""
  if not RESULT.exists():
    return
  r = read(RESULT)
  config, waited = r['config'], r['seconds_waited']
  caption = (
    f'Rounds of {config["model"]["name"]} ({config["local_steps"]} steps, '
    f'{config["num_workers"]} workers, checkpoints of '
    f'{r["checkpoint_bytes"] / 1e6:.0f} MB) with and without a checkpoint '
    'after each, which is written while the next round runs. Medians of '
    f'{len(r["turns"])} turns of each, {machine(r["provenance"])}. "Waited" is '
    'the part of a round in which nothing else goes on; "ratio" is that of all '
    'time, with the least and the most of the turns. The goal was 3 %.'
  )
  row = [
    f'{r["seconds_without"]:.1f} s',
    f'{waited:.2f} s ({waited / r["seconds_without"]:.1%})',
    f'{r["ratio"]:.3f} ({r["ratio_least"]:.3f} to {r["ratio_most"]:.3f})',
  ]
  yield Table(caption, r['command'], ['a round', 'waited', 'ratio'], [row])


def main() -> int:
  """Runs the experiment."""
  parser = Parser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('--turns', type=count, default=5, help='of each kind')
  parser.add_argument('--rounds', type=count, default=3, help='in a turn')
  parser.add_argument('--local_steps', type=count, help='of a round')
  options = parsed(parser)
  fields = dict(FIELDS)
  if options.local_steps:
    fields['local_steps'] = options.local_steps
  jax.config.update('jax_num_cpu_devices', 4)
  config = load_card('digits', '', fields)
  validate(config)
  setup = prepare(config)
  phase, state = restore.start(setup, None)
  with tempfile.TemporaryDirectory() as folder:
    checkpoints = Checkpoints(pathlib.Path(folder), setup.mesh)
    state, _, _ = timed(phase, setup.pipeline, state, 0, 1, checkpoints)
    turns, done = [], 1
    for _ in range(options.turns):
      turn = {}
      for name, where in (('without', None), ('with', checkpoints)):
        state, seconds, waited = timed(
          phase, setup.pipeline, state, done, options.rounds, where
        )
        done += options.rounds
        turn[name] = seconds / options.rounds
        if where:
          turn['waited'] = waited / options.rounds
      turns.append(turn)
    newest = pathlib.Path(folder) / 'checkpoints' / str(done)
    size = sum(p.stat().st_size for p in newest.rglob('*') if p.is_file())
  ratios = [turn['with'] / turn['without'] for turn in turns]
  record = {
    'provenance': provenance(),
    'command': command('experiments.checkpoint_cost'),
    'config': config.to_dict(),
    'checkpoint_bytes': size,
    'turns': turns,
    'seconds_without': statistics.median(turn['without'] for turn in turns),
    'seconds_waited': statistics.median(turn['waited'] for turn in turns),
    'ratio': statistics.median(ratios),
    'ratio_least': min(ratios),
    'ratio_most': max(ratios),
  }
  write_record(options.out or RESULT, record)
  del record['config']
  print(json.dumps(record, indent=2))
  return 0


if __name__ == '__main__':
  sys.exit(main())
