"""Trains, tests, saves and resumes a network whose chain fits on no device.

  python -m experiments.memory

Eight workers on eight devices hold a chain of 64 blocks, eight each. The memory
budget of a device is smaller than the chain. The compiler reports the memory of
every program of the run, and the live arrays on each device are sampled many
times a second. The largest sum of both is a bound of what a device held.
"""

import collections
from collections.abc import Iterator
import json
import sys
import tempfile
import threading
import time
from typing import Any

import jax

from experiments.runs import RESULTS, load, parsed, provenance, write_record
from experiments.table import Table
from resist_jax import accounting
from resist_jax.errors import Parser
from resist_jax.run import config as config_lib
from resist_jax.run import train

RESULT = RESULTS / 'memory' / 'digits.json'
WORKERS = 8


def get_config():
  """Returns the config of digits with a chain of 64 blocks of 128 channels."""
  config = config_lib.get_config()
  config.model.stage_sizes = (1, 1, 65, 1)
  config.model.widths = (16, 16, 128, 128)
  config.num_workers = config.num_devices = WORKERS
  config.num_rounds, config.local_steps, config.batch_size = 2, 2, 16
  config.eval_every = config.checkpoint_every = 2
  config.evaluation.batch_size = 60
  config.evaluation.statistics_images = 480
  config.evaluation.stream_blocks = True  # No device can hold the chain.
  config.evaluation.batches_at_once = 4
  return config


class LiveArrays(threading.Thread):
  """A thread that samples the bytes of the live arrays on each device.

  Attributes:
    largest: The most bytes on one device in any sample.
    samples: Number of samples taken.
  """

  def __init__(self):
    super().__init__(daemon=True)
    self.largest = self.samples = 0
    self._stop_event = threading.Event()

  def run(self):
    """Samples until `stop` is called."""
    while not self._stop_event.is_set():
      # By address, because reading `shard.data` creates another array on the
      # same buffer.
      buffers: dict[tuple[int, int], int] = {}
      for array in jax.live_arrays():
        try:
          for shard in array.addressable_shards:
            address = shard.device.id, shard.data.unsafe_buffer_pointer()
            buffers[address] = shard.data.nbytes
        except (RuntimeError, ValueError):  # It was donated in the meantime.
          continue
      live = collections.Counter()
      for (device, _), size in buffers.items():
        live[device] += size
      self.largest = max(self.largest, *live.values(), 0)
      self.samples += 1
      time.sleep(0.002)

  def stop(self):
    """Ends the sampling."""
    self._stop_event.set()
    self.join()


def programs() -> list[dict[str, Any]]:
  """Returns the bytes on a device that each live compiled program needs."""
  listed = []
  for executable in jax.devices()[0].client.live_executables():
    parts = accounting.memory_parts(executable.get_compiled_memory_stats())
    listed.append({'name': executable.hlo_modules()[0].name, **parts})
  return listed


def main() -> int:
  """Runs the experiment; returns 1 if a device exceeded the budget."""
  parser = Parser(description=__doc__.split('\n')[0])
  parser.add_argument('--budget', type=float, default=64, help='MiB a device')
  args = parsed(parser)
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', WORKERS)
  live = LiveArrays()
  live.start()
  config = get_config()
  with tempfile.TemporaryDirectory() as folder:
    train.train(config, folder)
    config.num_rounds = 3  # The run resumes from its checkpoint.
    summary = train.train(config, folder)
  live.stop()
  # The programs of the rounds are no longer alive; the summary lists them.
  compiled = [
    *programs(),
    *(
      {'name': name, **parts}
      for name, parts in summary['memory_per_device']['compiled'].items()
    ),
  ]
  compiled.sort(key=lambda program: -program['peak'])
  scratch = max(p['outputs'] + p['temporary'] for p in compiled)
  (length,) = summary['num_blocks'].values()
  chain = accounting.BYTES_PER_NUMBER * summary['params_per_block'] * length
  record = {
    'provenance': provenance(),
    'config': config.to_dict(),
    'budget_bytes': round(args.budget * 2**20),
    'chain_bytes': chain,
    'parameter_bytes_per_device': summary['memory_per_device']['predicted'][
      'parameters'
    ],
    'largest_live_arrays_bytes': live.largest,
    'samples': live.samples,
    'largest_outputs_and_temporary_bytes': scratch,
    'bound_bytes': live.largest + scratch,
    'programs': len(compiled),
    'largest_programs': compiled[:5],
    'rounds': summary['rounds'],
    'test_accuracy': summary['test_accuracy'],
  }
  write_record(args.out or RESULT, record)
  print(
    json.dumps({k: v for k, v in record.items() if k != 'config'}, indent=2)
  )
  if record['budget_bytes'] >= chain:
    print('the chain alone fits in the budget: give a smaller --budget')
    return 1
  if record['bound_bytes'] > record['budget_bytes']:
    print('a device may have exceeded the budget')
    return 1
  print('no device exceeded the budget')
  return 0


def tables() -> Iterator[Table]:
  """Yields what a device held, beside its budget and the whole chain."""
  for r in load('memory/*.json'):
    names = ('chain_bytes', 'budget_bytes', 'bound_bytes')
    names = (*names, 'parameter_bytes_per_device')
    caption = (
      'A run trains, tests, saves and resumes a network whose chain is larger '
      'than the memory budget of a device. MiB of the whole chain, of the '
      'budget, of the most that a device held (arrays and scratch memory, data '
      'included), and of the parameters on it.'
    )
    head = ['whole chain', 'budget', 'most held', 'parameters held']
    row = [f'{r[name] / 2**20:.0f}' for name in names]
    yield Table(caption, 'python -m experiments.memory', head, [row])


if __name__ == '__main__':
  sys.exit(main())
