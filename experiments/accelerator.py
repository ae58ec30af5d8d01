"""Compares rounds on an accelerator with the same rounds on a CPU.

Four workers train on one device, from the same parameters and batches: as one
program and step by step, under every protocol, in float64, and ResIST in the
precisions that people train in. The reference is the CPU, step by step, in
float64, because in float32 a ReLU that flips makes two exact implementations
differ. Each platform runs in a process of its own.

  python -m experiments.accelerator
  python -m experiments.accelerator --only='masked_psum, float64' --out=FILE

The result is written to experiments/results/accelerator/ with its provenance,
that of some cases to a file of its own.
"""

import argparse
from collections.abc import Iterator, Mapping
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.runs import (
  RESULTS,
  load,
  machine,
  parsed,
  provenance,
  write_record,
)
from experiments.table import Table
from resist_jax import Trainer, exchange, folders, make_mesh, models
from resist_jax.errors import Parser
from resist_jax.run import optimizer

FOLDER = RESULTS / 'accelerator'
SEED, CHAIN, LENGTH, CLASSES = 0, 'stage3_chain', 7, 10
S, T, B, ROUNDS, IMAGES = 4, 3, 16, 2, 64
# Seven blocks over four workers of three slots: some are empty, some hold
# replicas.
PROTOCOLS = {
  'resist_hand_over': {'exchange': 'hand_over', 'min_depth': 3},
  'resist_masked_psum': {'exchange': 'masked_psum', 'min_depth': 3},
  'local_sgd': {},
  'data_parallel': {'average_gradients': True, 'carry': True},
}


class Case(NamedTuple):
  """One way to run the rounds.

  Attributes:
    protocol: A key of `PROTOCOLS`.
    dtype: Compute dtype; parameters are float64 with it, otherwise float32.
    precision: Value of `jax_default_matmul_precision`.
    on_device: One program, or steps dispatched from the host.
  """

  protocol: str
  dtype: str = 'float64'
  precision: str = 'highest'
  on_device: bool = False

  @property
  def name(self) -> str:
    """Its name in results."""
    form = 'one program' if self.on_device else 'step by step'
    return f'{self.protocol}, {self.dtype} {self.precision}, {form}'


FIRST = next(iter(PROTOCOLS))
# By default a product in float32 may use fewer bits (TF32).
LOW = [
  Case(FIRST, 'float32', 'highest', True),
  Case(FIRST, 'float32', 'default', True),
  Case(FIRST, 'bfloat16', 'default', True),
]
REFERENCES = [Case(name) for name in PROTOCOLS]
CASES = {
  'cpu': [*REFERENCES, Case(FIRST, 'float32')],
  'accelerator': [
    *(Case(name, on_device=True) for name in PROTOCOLS),
    *LOW,
    *REFERENCES,
  ],
}


def run(case: Case) -> dict[str, np.ndarray]:
  """Runs rounds on the first device of this process.

  Args:
    case: What to run.

  Returns:
    The global parameters after them, flat, by path.
  """
  wide = 'float64' if case.dtype == 'float64' else 'float32'
  network = models.ResNet(
    num_classes=CLASSES,
    stage_sizes=(1, 1, 1 + LENGTH, 1),
    widths=(16, 16, 32, 32),
    dtype=case.dtype,
    platform=jax.devices()[0].platform,
  )
  rng = np.random.default_rng(SEED)
  images = rng.normal(size=(IMAGES, 16, 16, 3)).astype(wide)
  labels = rng.integers(0, CLASSES, IMAGES).astype(np.int32)
  key = jax.random.key(SEED)
  shapes = jax.eval_shape(network.init, key, jnp.zeros((1, 16, 16, 3)))
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: _draw(rng, path[-1].key, x.shape).astype(wide),
    shapes['params'],
  )

  def loss_fn(params, present, batch, key, constants):
    del key
    images, labels = constants
    lengths = {k: len(jax.tree.leaves(params[k])[0]) for k in present}
    subnetwork = network.with_chain_lengths(lengths)
    logits: Any = subnetwork.apply({'params': params}, images[batch], present)
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, labels[batch]
    )
    return losses.mean().astype(jnp.float32), {}

  with jax.default_matmul_precision(case.precision):
    trainer = _trainer(case, loss_fn, (images, labels))
    state = trainer.init(params)
    for _ in range(ROUNDS):
      batches = rng.integers(0, IMAGES, (S, T, B)).astype(np.int32)
      state, _ = trainer.round(state, batches)
  leaves = jax.tree_util.tree_leaves_with_path(trainer.params(state))
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def _draw(rng, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Draws a parameter on the host, so that it is the same on all platforms."""
  values = rng.normal(size=shape)
  if name == 'kernel':
    return values * np.sqrt(2 / np.prod(shape[-4:-1]))
  return 0.1 * values + (name == 'scale')


def _trainer(case: Case, loss_fn, constants) -> Trainer:
  settings: dict[str, Any] = dict(PROTOCOLS[case.protocol])
  name = settings.pop('exchange', '')
  return Trainer(
    loss_fn,
    optimizer.make_optimizer(lambda _: jnp.float32(0.05), 0.9, 5e-4),
    num_workers=S,
    local_steps=T,
    chains=(CHAIN,) if name else (),
    exchange=getattr(exchange, name or 'hand_over')(),
    mesh=make_mesh(1),
    seed=SEED,
    constants=constants,
    on_device=case.on_device,
    **settings,
  )


def difference(
  ours: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]
) -> dict[str, float]:
  """Compares parameters.

  Args:
    ours: Parameters by path.
    reference: Parameters to compare with, by path.

  Returns:
    `largest`: the largest difference in an array, divided by the largest value
    in it, of all arrays; `of_norm`: the norm of all differences, divided by
    that of all values.

  >>> difference({'w': np.array([1.0, 3.0])}, {'w': np.array([0.0, 4.0])})
  {'largest': 0.25, 'of_norm': 0.3535533905932738}
  """
  wide = {k: np.asarray(x, np.float64) for k, x in ours.items()}
  apart = {k: np.abs(wide[k] - reference[k]) for k in reference}
  largest = max(apart[k].max() / np.abs(x).max() for k, x in reference.items())
  squares = sum(np.square(x).sum() for x in apart.values())
  norm = sum(np.square(x).sum() for x in reference.values())
  return {'largest': float(largest), 'of_norm': float(np.sqrt(squares / norm))}


def chosen(platform: str, only: str) -> list[Case]:
  """Returns what to run.

  Args:
    platform: A key of `CASES`.
    only: Part of the names of cases of the accelerator; empty for all cases.

  Returns:
    The cases, and on a CPU the references of those of the accelerator.
  """
  asked = [case for case in CASES['accelerator'] if only in case.name]
  if platform == 'accelerator':
    return asked
  protocols = {case.protocol for case in asked}
  needed = [case for case in REFERENCES if case.protocol in protocols]
  return needed if only else CASES[platform]


def run_all(platform: str, only: str, folder: pathlib.Path) -> None:
  """Runs the cases of a platform; the traceback of a failure is kept.

  Args:
    platform: A key of `CASES`.
    only: See `chosen`.
    folder: Where to write the parameters of each case, and a description.
  """
  seconds, errors = {}, {}
  device = f'{len(jax.devices())} x {jax.devices()[0].device_kind}'
  for case in chosen(platform, only):
    jax.config.update('jax_enable_x64', case.dtype == 'float64')
    started = time.perf_counter()
    try:
      params = run(case)
      path = folder / file_name(platform, case)
      np.savez(path, allow_pickle=False, **params)
    except Exception:  # The other cases still run.
      errors[case.name] = traceback.format_exc()
      print(errors[case.name], file=sys.stderr)
    seconds[case.name] = time.perf_counter() - started
    print(f'{platform}: {case.name}: {seconds[case.name]:.1f} s', flush=True)
    record = {'device': device, 'seconds': seconds, 'errors': errors}
    (folder / f'{platform}.json').write_text(json.dumps(record))


def file_name(platform: str, case: Case) -> str:
  """Returns the name of the file with the parameters of a case."""
  return f'{platform}_{CASES[platform].index(case)}.npz'


def _about(path: pathlib.Path) -> dict:
  """Reads what a platform says of itself, or exits."""
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    sys.exit(f'error: no case has begun on {path.stem}; see above.')


def main() -> int:
  """Compares, prints and writes the result; returns 1 if a case failed."""
  parser = Parser(description=__doc__.split('\n')[0])
  parser.add_argument('--timeout', type=float, default=600, help='seconds')
  parser.add_argument('--only', default='', help='part of the names of cases')
  parser.add_argument('--platform', choices=[*CASES], help=argparse.SUPPRESS)
  parser.add_argument('--folder', type=folders.argument, help=argparse.SUPPRESS)
  args = parsed(parser, free=['timeout', 'platform', 'folder'])
  if args.platform:
    run_all(args.platform, args.only, args.folder)
    return 0
  if not chosen('accelerator', args.only):
    names = '; '.join(case.name for case in CASES['accelerator'])
    parser.error(f'--only is {args.only!r}; no case has it: {names}.')
  if not args.out and _platform() == 'cpu':
    parser.error('JAX sees no accelerator here, so there is nothing to see.')
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    _run_platforms(folder, args.only, args.timeout)
    about = {p: _about(folder / f'{p}.json') for p in CASES}
    results = _compare(folder, args.only)
  for row in results:
    print(
      f'{row["platform"]:12}{row["case"]:58}'
      f'{row["largest"]:10.1e}{row["of_norm"]:10.1e}'
    )
  record = {
    'command': 'python -m experiments.accelerator'
    + (f' --only={shlex.quote(args.only)}' if args.only else ''),
    'provenance': provenance(about['accelerator']['device']),
    'seed': SEED,
    'config': {
      'workers': S,
      'local_steps': T,
      'batch_size': B,
      'rounds': ROUNDS,
      'chain': LENGTH,
      'protocols': PROTOCOLS,
    },
    'reference': 'CPU, step by step, float64',
    'results': results,
    'platforms': about,
  }
  compared = [r for r in results if r['platform'] == 'accelerator']
  failed = len(compared) < len(chosen('accelerator', args.only))
  if failed and not args.out:
    print('not written, because a case failed: name a file with --out')
    return 1
  kind = about['accelerator']['device'].split(' x ')[1].replace(' ', '_')
  path = args.out or FOLDER / f'{kind}.json'
  write_record(path, record)
  print('written to', path)
  return failed


def _platform() -> str:
  """Returns JAX's platform, from a process that frees its devices again."""
  code = 'import jax; print(jax.devices()[0].platform)'
  command = [sys.executable, '-c', code]
  asked = subprocess.run(command, stdout=subprocess.PIPE, text=True)
  return asked.stdout.strip()


def _run_platforms(folder: pathlib.Path, only: str, timeout: float) -> None:
  """Runs all platforms at once, and ends those that take too long."""
  command = [sys.executable, '-m', 'experiments.accelerator']
  children = []
  for platform in CASES:
    environment = {**os.environ}
    if platform == 'cpu':
      environment['JAX_PLATFORMS'] = 'cpu'
    args = [f'--platform={platform}', f'--folder={folder}', f'--only={only}']
    args.append(f'--out={folder / "none.json"}')  # A part is no result.
    children.append(subprocess.Popen([*command, *args], env=environment))
  ends = time.monotonic() + timeout
  for child in children:
    try:
      child.wait(max(0, ends - time.monotonic()))
    except subprocess.TimeoutExpired:
      child.kill()
      child.wait()


def _compare(folder: pathlib.Path, only: str) -> list[dict[str, Any]]:
  """Compares the parameters that were written with the references."""

  def read(platform, case):
    path = folder / file_name(platform, case)
    return dict(np.load(path)) if path.exists() else None

  rows = []
  for platform in CASES:
    for case in chosen(platform, only):
      reference, ours = read('cpu', Case(case.protocol)), read(platform, case)
      is_reference = platform == 'cpu' and case in REFERENCES
      if ours and reference and not is_reference:
        row = {'platform': platform, 'case': case.name}
        rows.append({**row, **difference(ours, reference)})
  return rows


def tables() -> Iterator[Table]:
  """Yields rounds on an accelerator beside the same rounds on a CPU."""
  for record in load('accelerator/*.json'):
    device = machine(record['provenance'], count=False)
    names = {'cpu': 'CPU', 'accelerator': device.split(',')[0]}
    rows = [
      [names[r['platform']], r['case'].replace('_', ' ')]
      + [f'{r["largest"]:.1e}', f'{r["of_norm"]:.1e}']
      for r in record['results']
    ]
    config = record['config']
    caption = (
      f'The parameters after {config["rounds"]} rounds of '
      f'{config["local_steps"]} steps, compared with those of the same rounds '
      f'on a CPU in float64. {config["workers"]} workers share one device '
      f'({device}). "Largest" is the largest difference '
      'in a parameter array divided by the largest value of that array; "norm" '
      'is the norm of all differences divided by the norm of all parameters.'
    )
    head = ['device', 'protocol, precision, program', 'largest', 'norm']
    yield Table(caption, record['command'], head, rows)


if __name__ == '__main__':
  sys.exit(main())
