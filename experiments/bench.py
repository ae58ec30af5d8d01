"""Times the parts of a round, and compares a local step with a plain one.

For each network, on random images, it measures a worker's local step as
`resist_jax.rounds` runs it, and a plain `jax.jit` of the same sub-network's
gradient and update. Then it measures a round of S workers, each exchange and
wire format and its share of a round, compile times and memory. Seconds are
medians; what is compared is timed in turn. `--profile=FOLDER` then stores a
round as JAX's profiler sees it.

  python -m experiments.bench                            # both networks
  python -m experiments.bench --network=paper --batch_size=128 --out=FILE

On an accelerator, `--steps=20` hides the time that the host takes to dispatch
one step; `--workers=1 --only_step` measures the full network. The result is
written to experiments/results/bench/ with its provenance, or to `--out`, which
other options need.
"""

import argparse
from collections.abc import Iterator
import json
import resource
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.runs import (
  RESULTS,
  command,
  count,
  load,
  machine,
  parsed,
  provenance,
  write_record,
)
from experiments.table import Table
from resist_jax import Trainer, accounting, data, folders, models
from resist_jax.decomposition import (
  Assignment,
  join,
  slots_per_worker,
)
from resist_jax.errors import Parser, refused
from resist_jax.exchange import masked_psum
from resist_jax.rounds import (
  Protocol,
  Whole,
  distribute,
  make_mesh,
  make_round,
)
from resist_jax.rounds.mesh import compiler_options
from resist_jax.run import classification, optimizer
from resist_jax.run.config import EXCHANGES

CHAIN = 'stage3_chain'


class Network(NamedTuple):
  """A network to measure.

  Attributes:
    network: The global network.
    size: Height and width of its images, in pixels.
    channels: Channels of its images.
    batch_size: Default of B, the batch size of a worker.
    local_steps: Default of T, the local steps in a round.
  """

  network: models.ResNet
  size: int
  channels: int
  batch_size: int
  local_steps: int


NETWORKS = {
  'digits': Network(models.PreActResNetTiny(num_classes=10), 8, 1, 32, 20),
  # The paper's B = 128 and T = 50 would take too long on a CPU.
  'paper': Network(models.PreActResNet101(num_classes=100), 32, 3, 16, 2),
}


def main() -> None:
  """Measures, prints and writes the results."""
  args = _arguments()
  if args.precision:
    jax.config.update('jax_default_matmul_precision', args.precision)
  # Without virtual devices, a single worker uses all cores.
  if args.workers > 1 and not args.only_step:
    jax.config.update('jax_num_cpu_devices', args.workers)
  # The seconds of compiling count, and on several CPU devices loads may hang.
  jax.config.update('jax_enable_compilation_cache', False)
  results = []
  for name in NETWORKS if args.network == 'both' else [args.network]:
    try:
      result = measure(NETWORKS[name], args)
    except ValueError as error:  # Such as more workers than blocks.
      sys.exit(refused(error))
    results.append({'network': name, **result})
    print(json.dumps(results[-1], indent=2))
  kind = jax.devices()[0].device_kind.replace(' ', '_')
  name = f'{kind}_{args.dtype}_{args.network}.json'
  path = args.out or RESULTS / 'bench' / name
  record = {
    'command': command('experiments.bench'),
    'provenance': provenance(),
    'seed': 0,
    'results': results,
  }
  write_record(path, record)
  print('written to', path)


def _arguments() -> argparse.Namespace:
  parser = Parser(description=__doc__.split('\n')[0])
  parser.add_argument('--network', choices=[*NETWORKS, 'both'], default='both')
  parser.add_argument('--workers', type=count, default=4, help='S, the workers')
  parser.add_argument('--batch_size', type=count, help='B, of a worker')
  parser.add_argument('--local_steps', type=count, help='T, in a round')
  parser.add_argument(
    '--repeats', type=count, default=7, help='timed calls of each function'
  )
  parser.add_argument(
    '--dtype', default='float32', choices=['float32', 'bfloat16']
  )
  parser.add_argument(
    '--precision',
    choices=['highest', 'tensorfloat32'],
    help='precision of float32 products',
  )
  parser.add_argument(
    '--only_step', action='store_true', help='measure no rounds'
  )
  parser.add_argument(
    '--steps', type=count, default=1, help='steps of a timed call'
  )
  parser.add_argument(
    '--profile',
    type=folders.output_folder,
    help='folder for the profile of a round',
  )
  return parsed(parser, free=['network', 'dtype', 'profile'])


def measure(spec: Network, args: argparse.Namespace) -> dict[str, Any]:
  """Measures one network.

  Args:
    spec: The network.
    args: The arguments of the command line.

  Returns:
    Seconds, images per second, shares and bytes, by name.
  """
  platform = jax.devices()[0].platform
  on_cpu = platform == 'cpu'
  network = spec.network.clone(dtype=args.dtype, platform=platform)
  B = args.batch_size or spec.batch_size
  T = args.local_steps or spec.local_steps
  dataset = _random_images(spec, 4 * B, network.num_classes)
  image = jnp.zeros((1, spec.size, spec.size, spec.channels))
  init = jax.jit(network.init)
  params = jax.device_get(init(jax.random.key(0), image)['params'])
  problem = (network, dataset, params, B)

  S = args.workers
  step = _one_worker(*problem, S, args.repeats, args.steps)
  whole = {}
  if not args.only_step:
    whole = _whole_round(*problem, S, T, args, not on_cpu)
  blocks = slots_per_worker(_length(params), S)
  flop = B * models.predicted_flops(network, image.shape[1:], {CHAIN: blocks})
  return {
    'dtype': args.dtype,
    'precision': args.precision,
    'batch_size': B,
    'blocks': blocks,
    **step,
    'flop_of_a_step': flop,
    'flop_per_second': flop / step['step_seconds'],
    **({} if on_cpu else {'flop_per_second_of_matmul': _matmul_rate(args)}),
    **whole,
    'peak_memory_of_process_bytes': _peak_memory(),
    'peak_memory_of_device_bytes': (jax.devices()[0].memory_stats() or {}).get(
      'peak_bytes_in_use'
    ),
  }


def _peak_memory() -> int:
  # macOS counts bytes, and others KiB.
  unit = 1 if sys.platform == 'darwin' else 1024
  return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _length(params) -> int:
  return jax.tree.leaves(params[CHAIN])[0].shape[0]


def _random_images(spec: Network, count: int, classes: int) -> data.Dataset:
  rng = np.random.default_rng(0)
  shape = (count, spec.size, spec.size, spec.channels)
  images = rng.integers(0, 256, shape).astype(np.uint8)
  split = data.Split(images, rng.integers(0, classes, count).astype(np.int32))
  half = np.full(spec.channels, 0.5, np.float32)
  names = tuple(map(str, range(classes)))
  return data.Dataset('random', split, {'test': split}, names, half, half / 2)


EXCHANGES_TIMED = (
  ('hand_over', 'float32'),
  ('masked_psum', 'float32'),
  ('hand_over', 'bfloat16'),
  ('hand_over', 'int8'),
)


def _loss(network, dataset):
  none = data.Augmentation()
  return classification.make_loss(network, dataset, {CHAIN: 1.0}, none)


def _sgd() -> optax.GradientTransformation:
  rate = optimizer.make_schedule('constant', 0.01, 100)
  return optimizer.make_optimizer(rate, 0.9, 5e-4)


def _matmul_rate(args) -> float:
  """Returns the FLOP/s that a large product of matrices reaches."""
  n = 8192
  x = jax.random.normal(jax.random.key(0), (n, n), args.dtype)
  product = jax.jit(jnp.matmul)
  (seconds,) = _in_turn((lambda: product(x, x),), args.repeats, 20)
  return 2 * n**3 / seconds


def _one_worker(
  network, dataset, params, B, S, repeats, steps
) -> dict[str, Any]:
  """Times a worker's step as a round runs it, and a plain jitted step."""
  # The sub-network of a worker of S is all that this mesh of one device has.
  blocks = slots_per_worker(_length(params), S)
  params = {**params, CHAIN: jax.tree.map(lambda x: x[:blocks], params[CHAIN])}
  slots = np.arange(blocks, dtype=np.int32)[None]
  protocol = Protocol(1, 1, {CHAIN: blocks}, masked_psum())
  loss_fn, sgd, mesh = _loss(network, dataset), _sgd(), make_mesh(1)
  run = make_round(
    loss_fn,
    sgd,
    protocol,
    mesh,
    seed=0,
    metrics=classification.METRICS,
    on_device=False,
  )
  constants = jax.device_put((dataset.train.images, dataset.train.labels))
  batches = np.arange(B, dtype=np.int32).reshape(1, 1, B)
  assignments = {CHAIN: Assignment(slots)}
  state = distribute(Whole(params), protocol, mesh, assignments)
  started = time.perf_counter()
  run = run.compile(state, constants, batches)
  compiled_in = time.perf_counter() - started

  # Copies that lie on no mesh: else the bare step would compile twice.
  sub = jax.tree.map(
    lambda x: jnp.array(np.array(x)[0]), join(state.shared, state.chain)
  )
  index, batch = np.int32(0), jnp.asarray(batches[:, 0])
  local = run.programs['begin'](state.shared, state.chain, state.carried, index)

  def ours():
    nonlocal local
    local = run.programs['step'](
      local, {CHAIN: slots}, constants, batch, index, index
    )
    return local

  present = {CHAIN: jnp.ones(slots.shape[1], jnp.float32)}

  options = compiler_options(mesh)

  @jax.jit(donate_argnums=(0, 1), compiler_options=options)
  def bare_step(params, opt_state, batch):
    def loss(params):
      return loss_fn(params, present, batch, jax.random.key(0), constants)

    grads, metrics = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = sgd.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, metrics

  carry = sub, jax.jit(sgd.init)(sub)

  def bare():
    nonlocal carry
    *carry, metrics = bare_step(*carry, batch[0])
    return carry, metrics

  ours_seconds, bare_seconds = _in_turn((ours, bare), repeats, steps)
  return {
    'step_seconds': ours_seconds,
    'bare_step_seconds': bare_seconds,
    'step_over_bare': ours_seconds / bare_seconds,
    'images_per_second_of_a_worker': B / ours_seconds,
    'compile_seconds_of_a_worker': compiled_in,
    'params_of_a_worker': sum(x.size for x in jax.tree.leaves(sub)),
  }


def _whole_round(
  network, dataset, params, B, S, T, args, on_device
) -> dict[str, Any]:
  """Times whole rounds of S workers, and every exchange alone."""
  trainer = Trainer(
    _loss(network, dataset),
    _sgd(),
    chains=(CHAIN,),
    num_workers=S,
    local_steps=T,
    constants=(dataset.train.images, dataset.train.labels),
    exclude_faulty=False,
    on_device=on_device,
  )
  batches = np.tile(np.arange(B, dtype=np.int32), (S, T, 1))
  state = trainer.init(params)
  started = time.perf_counter()
  trainer = trainer.compile(state, batches)
  compiled_in = time.perf_counter() - started
  assert trainer.programs is not None
  memory = accounting.compiled_memory(trainer.programs)

  def one_round():
    nonlocal state
    state, _ = trainer.round(state, batches)
    return state.shared, state.chain

  repeats = args.repeats
  (seconds,) = _in_turn((one_round,), max(3, repeats // 2))
  if args.profile:  # After the timing, which it would disturb.
    with jax.profiler.trace(args.profile):
      jax.block_until_ready(one_round())
  del state
  exchanges = [_exchange(trainer, params, *kind) for kind in EXCHANGES_TIMED]
  times = _in_turn(exchanges, repeats)
  training = seconds - times[0]  # The timed round hands over in float32.
  return {
    'workers': S,
    'devices': trainer.devices.size,
    'local_steps': T,
    'round_seconds': seconds,
    'images_per_second': S * T * B / seconds,
    'exchange_seconds': {
      ' '.join(kind): t for kind, t in zip(EXCHANGES_TIMED, times, strict=True)
    },
    'exchange_share_of_round_at_T_50': {
      ' '.join(kind): t / (t + 50 * training / T)
      for kind, t in zip(EXCHANGES_TIMED, times, strict=True)
    },
    'compile_seconds_of_round': compiled_in,
    'compiled_memory': memory,
  }


def _exchange(trainer: Trainer, params, exchange: str, wire_format: str):
  """Returns a function that begins a round and ends it, without a step."""
  S, mesh = trainer.num_workers, trainer.devices
  protocol = Protocol(
    S, 0, {CHAIN: _length(params)}, EXCHANGES[exchange](wire_format)
  )
  run = make_round(
    trainer.loss_fn, trainer.optimizer, protocol, mesh, seed=0, on_device=False
  )
  state = distribute(Whole(params), protocol, mesh, protocol.assign(0, 0))
  batches = np.zeros((S, 0, 1), np.int32)

  def run_exchange():
    nonlocal state
    state, _ = run(state, None, batches)
    return state.shared, state.chain

  return run_exchange


def _in_turn(functions, repeats: int, calls: int = 1) -> list[float]:
  """Calls functions in turn, and returns the median seconds of each.

  The first call of each function, which may compile, is not counted.
  """
  times: list[list[float]] = [[] for _ in functions]
  for turn in range(repeats + 1):
    for function, seconds in zip(functions, times, strict=True):
      started = time.perf_counter()
      for _ in range(calls - 1):
        function()
      jax.block_until_ready(function())
      if turn:
        seconds.append((time.perf_counter() - started) / calls)
  return [statistics.median(seconds) for seconds in times]


def tables() -> Iterator[Table]:
  """Yields the parts of a round, for each machine and dtype."""
  records = [*load('bench/*_both.json'), *load('bench/*bench_*.json')]
  for record in records:
    if 'workers' not in record['results'][0]:  # Steps alone were measured.
      continue
    kinds = record['results'][0]['exchange_share_of_round_at_T_50']
    head = ['network', 'step of a worker', 'over a plain step']
    head += [kind.replace('_', ' ') for kind in kinds]
    head += ['compile', 'images/s, all']
    rows = []
    for r in record['results']:
      shares = r['exchange_share_of_round_at_T_50']
      rows.append(
        [
          f'{r["network"]}, batch {r["batch_size"]}, {r["blocks"]} blocks',
          f'{r["step_seconds"]:.3g} s',
          f'{r["step_over_bare"]:.2f}',
          *(f'{share:.1%}' for share in shares.values()),
          f'{r["compile_seconds_of_round"]:.1f} s',
          f'{r["images_per_second"]:.0f}',
        ]
      )
    first = record['results'][0]
    caption = (
      f'{first["workers"]} workers on {first["devices"]} devices in '
      f'{first["dtype"]}, {machine(record["provenance"], count=False)}. The '
      'second column of numbers divides a step by a plain jitted step of the '
      'same sub-network. Exchanges are shares of the time of a round of 50 '
      'steps.'
    )
    yield Table(caption, record['command'], head, rows)


if __name__ == '__main__':
  main()
