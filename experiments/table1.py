"""The paper's Table 1, bytes per round, beside ours and the bytes on the wire.

For PreActResNet101 on CIFAR-100 with 2, 4 and 8 workers, it prints gigabytes by
the paper's count; and those that the workers, one device each, send to each
other with every protocol, exchange and wire format, also as a share of what
local SGD sends in float32.

  python -m experiments.table1
  python -m experiments.table1 --compiled  # compare with compiled programs
  python -m experiments.table1 --json      # print JSON instead of tables
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping
import itertools
import json
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.runs import provenance, write_record
from resist_jax import models, report, rounds
from resist_jax.accounting import hlo, traffic
from resist_jax.accounting.traffic import Sizes
from resist_jax.decomposition.assignments import Assignment
from resist_jax.decomposition.slots import split
from resist_jax.exchange import collectives, compression
from resist_jax.rounds import compiled
from resist_jax.rounds import state as state_lib
from resist_jax.rounds.state import Protocol
from resist_jax.run import optimizer

PyTree = Any

CHAIN = 'stage3_chain'
IMAGE, CLASSES = (32, 32, 3), 100
STEPS = 50  # T, the steps in a round; only data parallel sends in each step.
# Gigabytes as the paper prints them. It does not give the minimum depths of
# ResIST; those below fit its gigabytes.
PAPER = {
  'local_sgd': {'2': 0.662, '4': 1.325, '8': 2.649},
  'resist': {'2': 0.454, '4': 0.720, '8': 1.289},
}
MIN_DEPTH = {2: 11, 4: 6, 8: 4}
GB = 1e9


class Variant(NamedTuple):
  """A row of the tables.

  Attributes:
    protocol: `local_sgd`, `data_parallel`, `resist` with the paper's minimum
      depth, or `resist_without_min_depth`.
    exchange: How parameters travel.
    wire_format: The format of the numbers that are sent.
  """

  protocol: str
  exchange: str
  wire_format: str


BASELINE = Variant('local_sgd', 'all_reduce', 'float32')
VARIANTS = [
  *(Variant('local_sgd', 'all_reduce', f) for f in compression.FORMATS),
  # Not int8, which encodes the change of parameters over a round.
  *(Variant('data_parallel', 'all_reduce', f) for f in ('float32', 'bfloat16')),
  *(
    Variant(protocol, exchange, f)
    for protocol in ('resist', 'resist_without_min_depth')
    for exchange in ('masked_psum', 'hand_over')
    for f in compression.FORMATS
  ),
]


def main() -> None:
  """Prints the tables; exits with 1 if a program's bytes are not predicted."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--json', action='store_true', help='print JSON')
  parser.add_argument(
    '--compiled',
    action='store_true',
    help='compare with compiled programs (takes minutes)',
  )
  parser.add_argument('--out', type=pathlib.Path, help='JSON file to write')
  args = parser.parse_args()
  jax.config.update('jax_num_cpu_devices', max(MIN_DEPTH))
  params = network_shapes()
  sizes = traffic.measure(params, [CHAIN])
  result = figures(sizes)
  if args.compiled:
    result['compiled'] = list(compiled_rows(params, sizes))
  if args.out:
    command = ' '.join(['python -m experiments.table1', *sys.argv[1:]])
    record = {'command': command, 'provenance': provenance(), **result}
    write_record(args.out, record)
  print(json.dumps(result, indent=2) if args.json else text(result))
  rows = result.get('compiled', [])
  sys.exit(any(row['predicted'] != row['read'] for row in rows))


def network_shapes() -> dict[str, PyTree]:
  """Returns the shapes of the network's parameters by name."""
  network = models.PreActResNet101(num_classes=CLASSES)
  return jax.eval_shape(
    lambda: network.init(jax.random.key(0), jnp.zeros((1, *IMAGE)))
  )['params']


def _protocol(variant: Variant, num_workers: int, length: int) -> Protocol:
  name, resist = variant.protocol, variant.protocol.startswith('resist')
  return Protocol(
    num_workers,
    STEPS,
    {CHAIN: length} if resist else {},
    MIN_DEPTH[num_workers] if name == 'resist' else 0,
    average_gradients=name == 'data_parallel',
    carry_velocity=name == 'data_parallel',
    exchange=variant.exchange if resist else 'masked_psum',
    wire_format=variant.wire_format,
  )


def _cut(sizes: Sizes, protocol: Protocol) -> Sizes:
  """Returns the sizes of the network as the protocol partitions it."""
  total = sizes.total
  return sizes if protocol.num_blocks else Sizes(total, total, {}, {})


def figures(sizes: Sizes) -> dict[str, Any]:
  """Computes the gigabytes of a round.

  Args:
    sizes: Sizes of the network with its chain partitioned.

  Returns:
    `paper` and `ours` by protocol and number of workers; `wire` by protocol,
    exchange, format and number of workers. All values are gigabytes.
  """
  length = sizes.num_blocks[CHAIN]
  ours: dict[str, Any] = {name: {} for name in PAPER}
  sent: dict[str, Any] = {}
  for S in MIN_DEPTH:
    for variant in VARIANTS:
      protocol = _protocol(variant, S, length)
      cut = _cut(sizes, protocol)
      exchanges = sent.setdefault(variant.protocol, {})
      formats = exchanges.setdefault(variant.exchange, {})
      formats.setdefault(variant.wire_format, {})[str(S)] = (
        traffic.wire_bytes(cut, protocol, S) / GB
      )
      if variant.protocol in PAPER:
        gigabytes = traffic.paper_bytes(cut, protocol) / GB
        ours[variant.protocol][str(S)] = gigabytes
  return {'paper': PAPER, 'ours': ours, 'wire': sent}


def compiled_rows(
  params: Mapping[str, PyTree],
  sizes: Sizes,
  workers: Iterable[int] = tuple(MIN_DEPTH),
  variants: Iterable[Variant] = VARIANTS,
) -> Iterator[dict[str, Any]]:
  """Reads the bytes of a round from its compiled programs.

  Args:
    params: Shapes of the network's parameters.
    sizes: Sizes of the network with its chain partitioned.
    workers: Numbers of workers.
    variants: Rows to compute.

  Yields:
    For each number of workers and variant, the bytes predicted for two
    consecutive assignments, and those read from the program. For a hand-over,
    also the number of blocks sent and of those that change their worker.
  """
  # Without this, the cache may return a program whose scopes have other names.
  jax.config.update('jax_compilation_cache_include_metadata_in_key', True)
  length = sizes.num_blocks[CHAIN]
  for S in workers:
    for variant in variants:
      protocol = _protocol(variant, S, length)
      deals = _two_deals(protocol)
      row: dict[str, Any] = {**variant._asdict(), 'workers': S}
      branches, pairs = {}, None
      if deals and protocol.exchange == 'hand_over':
        branches, pairs = traffic.branches(CHAIN, *deals), {CHAIN: deals}
        row['blocks_sent'] = traffic.messages(protocol.dealer(CHAIN), *deals, S)
        row['blocks_that_change_workers'] = _changes(*deals, length)
      cut = _cut(sizes, protocol)
      print(*row.values(), file=sys.stderr)
      yield {
        **row,
        'predicted': traffic.wire_bytes(cut, protocol, S, pairs),
        'read': _read_bytes(params, protocol, deals, branches),
      }


def _changes(before: Assignment, after: Assignment, length: int) -> int:
  """Counts the blocks that a worker receives without having held them."""
  held, wanted = (
    (deal.slots[:, :, None] == np.arange(length)).any(axis=1)
    for deal in (before, after)
  )
  return int((wanted & ~held).sum())


def _two_deals(protocol: Protocol) -> tuple[Assignment, Assignment] | None:
  if not protocol.num_blocks:
    return None
  if protocol.exchange == 'hand_over':
    deals = protocol.dealer(CHAIN).deals([0])
    return next(deals), next(deals)
  slots = protocol.sample_slots(jax.random.key(0), CHAIN)
  return (Assignment(np.asarray(slots)),) * 2


def _loss(params, present, constants, batch, key):
  """Replaces the network's loss: the bytes depend only on the shapes."""
  del present, constants, batch, key
  total = sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
  return jnp.asarray(total), {}


def _read_bytes(
  params: Mapping[str, PyTree],
  protocol: Protocol,
  deals: tuple[Assignment, Assignment] | None,
  branches: Mapping[str, int],
) -> int:
  """Compiles the program that sends, for abstract arrays, and counts bytes."""
  S, mesh = protocol.num_workers, state_lib.make_mesh(protocol.num_workers)
  run = rounds.make_round(
    _loss,
    optimizer.make_optimizer(0.9, 5e-4),
    optimizer.make_schedule('constant', 0.01, 1),
    protocol,
    mesh,
    seed=0,
    on_device=False,
  ).compiled

  def array(shape, dtype, spec=state_lib.SHARDED):
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  shared, chain = split(params, protocol.num_blocks)
  size = traffic.measure(shared, []).total
  shared = jax.tree.map(lambda x: array((S, *x.shape), x.dtype), shared)
  chain = {
    name: jax.tree.map(
      lambda x, k=k: array((S, k, *x.shape[1:]), x.dtype), chain[name]
    )
    for name in protocol.num_blocks
    for k in [protocol.slots_per_worker(name)]
  }
  velocity = {'shared': shared, 'chain': chain}
  local = jax.eval_shape(
    run['begin'], shared, chain, velocity if protocol.carry_velocity else None
  )
  local = jax.tree.map(lambda x: array(x.shape, x.dtype), local)
  if protocol.average_gradients:  # Data parallel sends only in its steps.
    index = np.int32(0)
    args = local, {}, (), array((S, 1), jnp.int32), index, index
    text = run['step'].lower(*args).compile().as_text()
    return protocol.local_steps * hlo.wire_bytes(text, branches)
  base = protocol.kept(shared, chain)
  error = None
  if protocol.keeps_error:
    shapes = collectives.error_shapes(size, S)
    error = {k: array(shape, jnp.float32) for k, shape in shapes.items()}

  def on_mesh(deal):
    specs = compiled.deal_specs(protocol.exchange == 'hand_over')
    deal = deal._replace(own=None)
    return jax.tree.map(lambda x, s: array(x.shape, x.dtype, s), deal, specs)

  before, after = [{CHAIN: on_mesh(d)} for d in deals or ()] or [{}, {}]
  program = run['finish'].lower(local, base, error, before, after).compile()
  return hlo.wire_bytes(program.as_text(), branches)


def text(result: Mapping[str, Any]) -> str:
  """Returns the tables as text.

  Args:
    result: What `figures` returns, and `compiled`, the rows of
      `compiled_rows`, if wanted.

  Returns:
    Lines of text.
  """
  parts = [_counted(result), _sent(result['wire'])]
  if 'compiled' in result:
    parts.append(_read(result['compiled']))
  return '\n\n'.join(parts)


def _counted(result: Mapping[str, Any]) -> str:
  head = ['protocol']
  for S in MIN_DEPTH:
    head += [f'S={S}: paper', 'ours']
  rows = [head]
  for name in PAPER:
    paper, ours = result['paper'][name], result['ours'][name]
    cells = [(f'{paper[S]:.3f}', f'{ours[S]:.5f}') for S in paper]
    rows.append([name, *itertools.chain(*cells)])
  depths = ', '.join(f'{d} (S={S})' for S, d in MIN_DEPTH.items())
  return '\n'.join(
    [
      "Table 1: gigabytes of a round by the paper's count. Each worker fetches",
      'its part and returns it: 2 * 4 * (S * shared + copies * block) bytes.\n',
      report.text_table(rows, right_from=1),
      f'\nThe minimum depths that fit are {depths}.',
      'The paper rounds some entries and truncates others.',
    ]
  )


def _sent(sent: Mapping[str, Any]) -> str:
  head = ['protocol', 'exchange', 'format']
  for S in MIN_DEPTH:
    head += [f'S={S}: GB', 'share']
  rows = [head]
  baseline = sent[BASELINE.protocol][BASELINE.exchange][BASELINE.wire_format]
  for variant in VARIANTS:
    sizes = sent[variant.protocol][variant.exchange][variant.wire_format]
    cells = [(f'{x:.4f}', f'{x / baseline[S]:.3f}') for S, x in sizes.items()]
    rows.append([*variant, *itertools.chain(*cells)])
  return '\n'.join(
    [
      'Gigabytes that all workers together, one device each, send in a round,',
      'averaged over all assignments, and their share of what local SGD sends',
      f'by a ring all-reduce in float32. data_parallel takes {STEPS} steps.',
      'resist has the minimum depths above, resist_without_min_depth none.\n',
      report.text_table(rows, right_from=3),
    ]
  )


def _read(compiled: list[dict[str, Any]]) -> str:
  head = ['protocol', 'exchange', 'format', 'S', 'predicted', 'read', 'moved']
  rows = [head]
  for row in compiled:
    moved = ''
    if 'blocks_sent' in row:
      moved = f'{row["blocks_sent"]}/{row["blocks_that_change_workers"]}'
    rows.append(
      [row['protocol'], row['exchange'], row['wire_format']]
      + [str(row['workers']), f'{row["predicted"]:,.0f}']
      + [f'{row["read"]:,.0f}', moved]
    )
  wrong = sum(row['predicted'] != row['read'] for row in compiled)
  verdict = f'{wrong} of {len(compiled)} differ.' if wrong else 'All are equal.'
  return '\n'.join(
    [
      'Bytes of the exchange between two consecutive assignments: predicted,',
      'and read from the compiled programs. moved: blocks sent / blocks that',
      'change their worker.\n',
      report.text_table(rows, right_from=3),
      f'\n{verdict}',
    ]
  )


if __name__ == '__main__':
  main()
