"""Digests of the parameters of a few tiny runs, which must stay the same.

PYTHONPATH=.:tests python tests/run/golden.py --write

adds the digests of this machine to `golden.json`.

A digest is that of one version of JAX, one kind of CPU and one way to compile.
Norms of every leaf are stored once; they hold everywhere, up to rounding.
"""

import hashlib
import json
import os
import pathlib
import platform
import sys
import tempfile

import conftest  # noqa: F401 - Before JAX: programs compile as in the tests.
import jax
import jaxlib
import numpy as np

from resist_jax.run import config as config_lib
from resist_jax.run import export, train

PATH = pathlib.Path(__file__).with_suffix('.json')

RUNS = {
  'hand_over int8 replicas': {'wire_format': 'int8', 'min_depth': 3},
  'masked_psum bfloat16 carried': {
    'exchange': 'masked_psum',
    'wire_format': 'bfloat16',
    'optimizer.carry_momentum': True,
  },
  'unequal': {'depths': (2, 2, 1, 1)},
  'data_parallel bfloat16': {
    'protocol': 'data_parallel',
    'wire_format': 'bfloat16',
  },
  'phases carried replicas': {
    'phases.full_before': 1,
    'optimizer.carry_momentum': True,
    'min_depth': 3,
  },
}


def config_of(name):
  config = config_lib.get_config()
  config.model.name = 'PreActResNet18'
  config.model.stage_sizes, config.model.widths = (1, 6), (8, 8)
  config.partition = (2,)
  config.num_workers = 4
  config.num_rounds, config.local_steps, config.batch_size = 3, 2, 8
  config.eval_every = config.checkpoint_every = 3
  config.evaluation.statistics_images = 200
  config.log.report = config.log.tensorboard = False
  with config.unlocked():
    config.update_from_flattened_dict(RUNS[name])
  return config


def train_run(name, workdir):
  """Trains, and returns the digest and the norm of each leaf."""
  digest = train.train(config_of(name), str(workdir))['params_hash']
  params = export.load(workdir).variables['params']
  norms = {
    jax.tree_util.keystr(path, simple=True, separator='/'): float(
      np.linalg.norm(np.asarray(leaf, np.float64).ravel())
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  return digest, norms


def signature():
  """Names the versions, the CPU, and how programs are compiled."""
  versions = f'jax {jax.__version__}, jaxlib {jaxlib.__version__}'
  info = pathlib.Path('/proc/cpuinfo')
  text = info.read_text().split('\n\n')[0] if info.is_file() else ''
  fields = dict(
    line.replace('\t', '').split(':', 1)
    for line in text.splitlines()
    if ':' in line
  )
  kinds = ('vendor_id', 'cpu family', 'model', 'model name', 'flags')
  cpu = [fields.get(kind, platform.processor()).strip() for kind in kinds]
  flags = sorted(
    flag
    for flag in os.environ.get('XLA_FLAGS', '').split()
    if 'timeout' not in flag
  )
  most = os.environ.get('JAX_DISABLE_MOST_OPTIMIZATIONS', '')
  digest = hashlib.sha256(repr((cpu, flags, most)).encode()).hexdigest()
  # More cores add numbers up in another order.
  return f'{versions}, {cpu[3]}, {os.cpu_count()} cores, {digest[:8]}'


def read():
  """Returns what is stored: `{'norms': {run: ...}, 'digests': {...}}`."""
  if PATH.is_file():
    return json.loads(PATH.read_text())
  return {'norms': {}, 'digests': {}}


def main():
  stored = read()
  digests = {}
  for name in RUNS:
    with tempfile.TemporaryDirectory() as workdir:
      digests[name], norms = train_run(name, workdir)
    stored['norms'].setdefault(name, norms)
    print(name, digests[name], flush=True)
  if sys.argv[1:] == ['--write']:
    stored['digests'][signature()] = digests
    PATH.write_text(json.dumps(stored, indent=1) + '\n')


if __name__ == '__main__':
  main()
