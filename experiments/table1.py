"""The paper's Table 1, bytes per round, beside ours and beside the wire.

For PreActResNet101 on CIFAR-100 and 2, 4 and 8 workers: gigabytes by the
paper's count, and what workers really send to each other, one device each, for
every protocol, exchange and wire format, in float32 also as a share of what
local SGD's ring all-reduce sends.

  python -m experiments.table1
  python -m experiments.table1 --compiled  # beside what XLA's programs send
  python -m experiments.table1 --json      # for machines
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping
import json
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np
import optax

from experiments.provenance import provenance
from resist_jax import accounting, models
from resist_jax.accounting import Sizes
from resist_jax.decomposition import Assigner, Assignment, split
from resist_jax.exchange import FORMATS, collectives, hand_over
from resist_jax.exchange.hand_over import messages
from resist_jax.rounds import Protocol, State, make_mesh, make_round
from resist_jax.rounds.mesh import REPLICATED, SHARDED
from resist_jax.rounds.moments import Parts
from resist_jax.run.config import EXCHANGES

PyTree = Any

CHAIN = 'stage3_chain'
IMAGE, CLASSES = (32, 32, 3), 100
STEPS = 50  # T, the steps in a round; only data parallel sends at each.
# As printed, GB; and the minimum depth, not printed, that fits ResIST's.
PAPER = {
  'local_sgd': {'2': 0.662, '4': 1.325, '8': 2.649},
  'resist': {'2': 0.454, '4': 0.720, '8': 1.289},
}
MIN_DEPTH = {2: 11, 4: 6, 8: 4}
GB = 1e9


class Variant(NamedTuple):
  """A way to train and to talk; `resist` has the paper's minimum depth."""

  protocol: str
  exchange: str
  wire_format: str


BASELINE = Variant('local_sgd', 'all_reduce', 'float32')
VARIANTS = [
  *(Variant('local_sgd', 'all_reduce', f) for f in FORMATS),
  # int8 is for changes between rounds, which data parallel has not.
  *(Variant('data_parallel', 'all_reduce', f) for f in ('float32', 'bfloat16')),
  *(
    Variant(protocol, exchange, f)
    for protocol in ('resist', 'resist_without_min_depth')
    for exchange in ('masked_psum', 'hand_over')
    for f in FORMATS
  ),
]


def main() -> None:
  """Prints the tables; exit code 1 if a program sends what is not predicted."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--json', action='store_true', help='for machines')
  parser.add_argument('--compiled', action='store_true', help='minutes')
  parser.add_argument('--out', type=pathlib.Path, help='JSON file to write')
  args = parser.parse_args()
  jax.config.update('jax_num_cpu_devices', max(MIN_DEPTH))
  params = network_shapes()
  sizes = accounting.measure(params, [CHAIN])
  result = figures(sizes)
  if args.compiled:
    result['compiled'] = list(compiled_rows(params, sizes))
  if args.out:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    command = ' '.join(['python -m experiments.table1', *sys.argv[1:]])
    record = {'command': command, 'provenance': provenance(), **result}
    args.out.write_text(json.dumps(record, indent=2) + '\n')
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
  # Where no chain is cut, only the format of the exchange matters.
  exchange = EXCHANGES.get(variant.exchange, hand_over)
  return Protocol(
    num_workers,
    STEPS,
    {CHAIN: length} if resist else {},
    exchange(variant.wire_format),
    MIN_DEPTH[num_workers] if name == 'resist' else 0,
    average_gradients=name == 'data_parallel',
    carry=name == 'data_parallel',
  )


def _cut(sizes: Sizes, protocol: Protocol) -> Sizes:
  """Returns the sizes as the protocol cuts the network."""
  total = sizes.total
  return sizes if protocol.num_blocks else Sizes(total, total, {}, {})


def figures(sizes: Sizes) -> dict[str, Any]:
  """Computes what is printed.

  Args:
    sizes: Of the network, its chain cut.

  Returns:
    GB of a round: `paper` and `ours` by protocol and number of workers, `wire`
    by protocol, exchange, format and number of workers.
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
        accounting.wire_bytes(cut, protocol, S) / GB
      )
      if variant.protocol in PAPER:
        gigabytes = accounting.paper_bytes(cut, protocol) / GB
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
    sizes: Of the network, its chain cut.
    workers: Each S wanted.
    variants: Rows wanted.

  Yields:
    For each variant and S, bytes predicted for two assignments in a row and
    read from the programs; for a hand-over also the blocks it sends, and how
    many of all blocks change their worker.
  """
  # Otherwise the cache may give a program with other names of scopes.
  jax.config.update('jax_compilation_cache_include_metadata_in_key', True)
  length = sizes.num_blocks[CHAIN]
  for S in workers:
    for variant in variants:
      protocol = _protocol(variant, S, length)
      before = protocol.assign(0, 0)
      after = protocol.assign(0, 1, before)
      moves = {name: (before[name], after[name]) for name in before}
      branches = accounting.branches(protocol, moves)
      row: dict[str, Any] = {**variant._asdict(), 'workers': S}
      if branches:  # Blocks are sent one by one.
        assigns = Assigner(*protocol.division(CHAIN))
        row['blocks_sent'] = messages(assigns, *moves[CHAIN], S)
        row['blocks_that_change_workers'] = _changes(*moves[CHAIN], length)
      cut = _cut(sizes, protocol)
      print(*row.values(), file=sys.stderr)
      yield {
        **row,
        'predicted': accounting.wire_bytes(cut, protocol, S, moves),
        'read': _read_bytes(params, protocol, before, branches),
      }


def _changes(before: Assignment, after: Assignment, length: int) -> int:
  """Counts the blocks that workers get without having held them."""
  held, wanted = (
    (assignment.slots[:, :, None] == np.arange(length)).any(axis=1)
    for assignment in (before, after)
  )
  return int((wanted & ~held).sum())


def _loss(params, present, batch, key):
  """Stands for the network's: what is sent depends on shapes alone."""
  del present, batch, key
  total = sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
  return jnp.asarray(total), {}


def _read_bytes(
  params: Mapping[str, PyTree],
  protocol: Protocol,
  assignments: Mapping[str, Assignment],
  branches: Mapping[str, int],
) -> int:
  """Compiles a round for arrays that never exist, and reads what it sends."""
  S = protocol.num_workers
  mesh, sgd = make_mesh(S), optax.sgd(0.01, momentum=0.9)
  run = make_round(_loss, sgd, protocol, mesh, seed=0, on_device=False)
  batches = jax.ShapeDtypeStruct((S, STEPS, 1), jnp.int32)
  state = _shapes_of_state(params, protocol, mesh, assignments)
  compiled = run.compile(state, None, batches)
  return accounting.compiled_wire_bytes(compiled, branches)


def _shapes_of_state(
  params: Mapping[str, PyTree],
  protocol: Protocol,
  mesh: Mesh,
  assignments: Mapping[str, Assignment],
) -> State:
  """Returns the shapes of a state, with momentum if the protocol carries it."""
  S = protocol.num_workers

  def array(shape, dtype, spec=SHARDED):
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  shared, chain = split(params, protocol.num_blocks)
  size = accounting.measure(shared, []).total
  shared = jax.tree.map(lambda x: array((S, *x.shape), x.dtype), shared)
  chain = {
    name: jax.tree.map(
      lambda x, k=k: array((S, k, *x.shape[1:]), x.dtype), chain[name]
    )
    for name in protocol.num_blocks
    for k in [protocol.slots_per_worker(name)]
  }
  momentum = Parts([{'shared': shared, 'chain': chain}], [])
  error = {
    name: array(shape, jnp.float32)
    for name, shape in collectives.error_shapes(size, S).items()
  }
  return State(
    shared,
    chain,
    jax.tree.map(lambda x: array(x.shape, x.dtype, REPLICATED), assignments),
    np.int32(0),
    dict(protocol.num_blocks),
    momentum if protocol.carry else None,
    error if protocol.keeps_error else None,
  )


def text(result: Mapping[str, Any]) -> str:
  """Returns the tables for people.

  Args:
    result: Of `figures`, perhaps with `compiled`.

  Returns:
    Lines.
  """
  parts = [_counted(result), _sent(result['wire'])]
  if 'compiled' in result:
    parts.append(_read(result['compiled']))
  return '\n\n'.join(parts)


def _counted(result: Mapping[str, Any]) -> str:
  head = ''.join(f'{f"S={S}: paper":>12}{"ours":>9}' for S in MIN_DEPTH)
  lines = [
    "Table 1, GB a round by the paper's count: every worker fetches its part",
    'and brings it back, 2 * 4 * (S * shared + copies * block) bytes.\n',
    f'{"":13}{head}',
  ]
  for name in PAPER:
    paper, ours = result['paper'][name], result['ours'][name]
    row = ''.join(f'{paper[S]:>12.3f}{ours[S]:>9.5f}' for S in paper)
    lines.append(f'{name:13}{row}')
  depths = ', '.join(f'{d} (S={S})' for S, d in MIN_DEPTH.items())
  lines += [
    f'\nMinimum depths that fit: {depths}.',
    'The paper rounds some entries and cuts others.',
  ]
  return '\n'.join(lines)


def _sent(sent: Mapping[str, Any]) -> str:
  head = ''.join(f'{f"S={S}: GB":>11}{"share":>8}' for S in MIN_DEPTH)
  lines = [
    'What really goes over the wire in a round, all workers together, one',
    'device each, mean over all assignments. GB, and as a share of what the',
    'ring all-reduce of local SGD sends in float32; data_parallel: '
    f'{STEPS} steps.',
    'resist has the minimum depths above, resist_without_min_depth none.\n',
    f'{"":25}{"exchange":12}{"format":9}{head}',
  ]
  whole = sent[BASELINE.protocol][BASELINE.exchange][BASELINE.wire_format]
  for protocol, way, form in VARIANTS:
    found = sent[protocol][way][form]
    row = ''.join(f'{x:>11.4f}{x / whole[S]:>8.3f}' for S, x in found.items())
    lines.append(f'{protocol:25}{way:12}{form:9}{row}')
  return '\n'.join(lines)


def _read(rows: list[dict[str, Any]]) -> str:
  lines = [
    'The same for two assignments in a row: bytes predicted, and read from the',
    'compiled programs. moved: blocks sent / blocks new to a worker.\n',
    f'{"":25}{"exchange":12}{"format":9}{"S":>2}{"predicted":>17}{"read":>17}'
    f'{"moved":>9}',
  ]
  for row in rows:
    moved = ''
    if 'blocks_sent' in row:
      moved = f'{row["blocks_sent"]}/{row["blocks_that_change_workers"]}'
    lines.append(
      f'{row["protocol"]:25}{row["exchange"]:12}{row["wire_format"]:9}'
      f'{row["workers"]:>2}{row["predicted"]:>17,.0f}{row["read"]:>17,.0f}'
      f'{moved:>9}'
    )
  wrong = sum(row['predicted'] != row['read'] for row in rows)
  verdict = f'{wrong} of {len(rows)} differ.' if wrong else 'All are equal.'
  return '\n'.join([*lines, f'\n{verdict}'])


if __name__ == '__main__':
  main()
