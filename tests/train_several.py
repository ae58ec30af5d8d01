"""Trains tiny runs, one after another; the test starts it in each process.

python tests/train_several.py FOLDER COORDINATOR NUM_PROCESSES PROCESS_ID RUN...
"""

import pathlib
import sys

import jax

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from wire import train_and_compare

from resist_jax.run import config as config_lib
from resist_jax.run import processes

WORKERS = 4
RUNS = {
  'hand_over': {},
  'replicas': {'min_depth': 3},
  'masked_psum': {'exchange': 'masked_psum', 'min_depth': 3},
  'int8': {'wire_format': 'int8'},
  'unequal': {'depths': (2, 2, 1, 1)},
  'phases': {'phases.full_before': 1, 'optimizer.carry_momentum': True},
  'local_sgd': {'protocol': 'local_sgd'},
  'data_parallel': {'protocol': 'data_parallel'},
  'streamed': {'data.streaming': 'always'},
}


def config_of(name):
  config = config_lib.get_config()
  config.model.name = 'PreActResNet18'
  config.model.stage_sizes, config.model.widths = (1, 6), (8, 8)
  config.partition = (2,)
  config.num_workers = WORKERS
  config.num_rounds, config.local_steps, config.batch_size = 3, 2, 8
  config.eval_every = config.checkpoint_every = 3
  config.evaluation.statistics_images = 200
  config.log.report = config.log.tensorboard = False
  with config.unlocked():
    config.update_from_flattened_dict(RUNS[name])
  return config


def main():
  folder, coordinator, count, process, *names = sys.argv[1:]
  place = processes.Place(coordinator, int(count), int(process))
  processes.start(place, {}, processes.Patience(300))
  jax.config.update('jax_num_cpu_devices', WORKERS // int(count))
  for name in names:
    train_and_compare(config_of(name), f'{folder}/{name}')
  processes.end()


if __name__ == '__main__':
  main()
