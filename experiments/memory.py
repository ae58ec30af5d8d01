"""Trains, tests, saves and resumes a network whose chain fits on no device.

  python -m experiments.memory

Eight workers on eight devices hold a chain of 64 blocks, eight each, under a
budget that the chain alone would break. The memory of every program that the
run compiled is read from the compiler, and that of all arrays alive on a device
is sampled many times a second. Their sum says what a device held at most.
"""

import argparse
import collections
import json
import pathlib
import sys
import tempfile
import threading
import time
from typing import Any

import jax

from experiments.provenance import provenance
from resist_jax import accounting
from resist_jax.run import config as config_lib
from resist_jax.run import train

RESULT = pathlib.Path(__file__).parent / 'results' / 'memory' / 'digits.json'
WORKERS = 8


def get_config():
  """Returns a run on digits with a chain of 64 blocks of 128 channels."""
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
  """Samples the bytes of the arrays alive on each device.

  Attributes:
    largest: Of a device, in any sample.
    samples: How many were taken.
  """

  def __init__(self):
    super().__init__(daemon=True)
    self.largest = self.samples = 0
    self._stop_event = threading.Event()

  def run(self):
    """Samples until `stop`."""
    while not self._stop_event.is_set():
      # By address: looking at a shard makes an array that shares its buffer.
      buffers: dict[tuple[int, int], int] = {}
      for array in jax.live_arrays():
        try:
          for shard in array.addressable_shards:
            place = shard.device.id, shard.data.unsafe_buffer_pointer()
            buffers[place] = shard.data.nbytes
        except (RuntimeError, ValueError):  # Donated meanwhile.
          continue
      held = collections.Counter()
      for (device, _), size in buffers.items():
        held[device] += size
      self.largest = max(self.largest, *held.values(), 0)
      self.samples += 1
      time.sleep(0.002)

  def stop(self):
    """Ends the sampling."""
    self._stop_event.set()
    self.join()


def programs() -> list[dict[str, Any]]:
  """Returns what each program compiled so far needs on a device, in bytes."""
  found = []
  for executable in jax.devices()[0].client.live_executables():
    parts = accounting.memory_parts(executable.get_compiled_memory_stats())
    found.append({'name': executable.hlo_modules()[0].name, **parts})
  return found


def main() -> int:
  """Runs it; 1 if the budget is broken."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--budget', type=float, default=64, help='MiB a device')
  args = parser.parse_args()
  jax.config.update('jax_num_cpu_devices', WORKERS)
  live = LiveArrays()
  live.start()
  config = get_config()
  with tempfile.TemporaryDirectory() as folder:
    train.train(config, folder)
    config.num_rounds = 3  # Goes on from the checkpoint.
    summary = train.train(config, folder)
  live.stop()
  # The programs of a round are gone with it; the run has read them.
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
  chain = accounting.BYTES_PER_PARAM * summary['params_per_block'] * length
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
  RESULT.parent.mkdir(parents=True, exist_ok=True)
  RESULT.write_text(json.dumps(record, indent=2) + '\n')
  kept = record['bound_bytes'] <= record['budget_bytes'] < chain
  print(
    json.dumps({k: v for k, v in record.items() if k != 'config'}, indent=2)
  )
  print(
    'the budget is', 'kept' if kept else 'broken, or no less than the chain'
  )
  return 0 if kept else 1


if __name__ == '__main__':
  sys.exit(main())
