"""The paper's Table 1, bytes per round, beside ours and the bytes on the wire.

For PreActResNet101 on CIFAR-100 with 2, 4 and 8 workers, it prints gigabytes by
the paper's count; and those that the workers, one device each, send to each
other with every protocol, exchange and wire format, also as a share of what
local SGD sends in float32.

  python -m experiments.table1
  python -m experiments.table1 --compiled  # compare with compiled programs
  python -m experiments.table1 --json      # print JSON instead of tables
"""

from collections.abc import Iterable, Iterator, Mapping
import itertools
import json
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import shapes
from experiments.runs import command, load, provenance, write_record
from experiments.table import Table
from resist_jax import accounting, folders, models, report
from resist_jax.accounting import Sizes
from resist_jax.decomposition import Assigner, Assignment
from resist_jax.errors import Parser
from resist_jax.exchange import FORMATS, hand_over
from resist_jax.exchange.hand_over import messages
from resist_jax.rounds import Protocol, make_mesh, make_round
from resist_jax.run.config import EXCHANGES

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
  *(Variant('local_sgd', 'all_reduce', f) for f in FORMATS),
  # Not int8, which encodes the change of parameters over a round.
  *(Variant('data_parallel', 'all_reduce', f) for f in ('float32', 'bfloat16')),
  *(
    Variant(protocol, exchange, f)
    for protocol in ('resist', 'resist_without_min_depth')
    for exchange in ('masked_psum', 'hand_over')
    for f in FORMATS
  ),
]


def main() -> None:
  """Prints the tables; exits with 1 if a program's bytes are not predicted."""
  parser = Parser(description=__doc__.split('\n')[0])
  parser.add_argument('--json', action='store_true', help='print JSON')
  parser.add_argument(
    '--compiled',
    action='store_true',
    help='compare with compiled programs (takes minutes)',
  )
  parser.add_argument(
    '--out', type=folders.output_file, help='JSON file to write'
  )
  args = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', max(MIN_DEPTH))
  params = network_shapes()
  sizes = accounting.measure(params, [CHAIN])
  result = figures(sizes)
  if args.compiled:
    result['compiled'] = list(compiled_rows(params, sizes))
  if args.out:
    about = f'{command("experiments.table1")} --out=FILE'
    record = {'command': about, 'provenance': provenance(), **result}
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
  """Counts the blocks that a worker receives without having held them."""
  held, wanted = (
    (assignment.slots[:, :, None] == np.arange(length)).any(axis=1)
    for assignment in (before, after)
  )
  return int((wanted & ~held).sum())


def _loss(params, present, batch, key):
  """Replaces the network's loss: the bytes depend only on the shapes."""
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
  state = shapes.state(params, sgd, protocol, mesh, assignments)
  compiled = run.compile(state, None, batches)
  return accounting.compiled_wire_bytes(compiled, branches)


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


def counts() -> Iterator[Table]:
  """Yields the paper's Table 1, from the sizes of its network."""
  for record in load('table1/*.json'):
    names = {'local_sgd': 'local SGD', 'resist': 'ResIST'}
    rows = [
      [names[protocol], workers, f'{record["ours"][protocol][workers]:.3f}']
      + [f'{theirs:.3f}']
      for protocol, by_workers in record['paper'].items()
      for workers, theirs in by_workers.items()
    ]
    caption = (
      'Gigabytes of float32 parameters that the workers fetch and bring back '
      "in a round, by the paper's count, for its ResNet101 on CIFAR-100."
    )
    head = ['protocol', 'workers', 'ours', 'the paper']
    yield Table(caption, record['command'], head, rows)


def wire() -> Iterator[Table]:
  """Yields what the exchanges of the paper's network send, as compiled."""
  for record in load('table1/*.json'):
    exact = record['wire']['local_sgd']['all_reduce']['float32']
    rows = []
    for r in record.get('compiled', ()):
      # A minimum depth changes nothing in what a masked psum sends.
      kind = r['protocol'], r['exchange']
      if r['workers'] != 4 or kind == (
        'resist_without_min_depth',
        'masked_psum',
      ):
        continue
      names = [
        r[k].replace('_', ' ') for k in ('protocol', 'exchange', 'wire_format')
      ]
      share = r['read'] / 1e9 / exact[str(r['workers'])]
      rows.append(
        [*names, f'{r["predicted"] / 1e9:.3f}']
        + [f'{r["read"] / 1e9:.3f}', f'{share:.3f}']
      )
    caption = (
      'Gigabytes that four workers, a device each, send in one round of the '
      "paper's ResNet101: as predicted, and as read from the compiled program. "
      'Data parallel takes 50 steps in the round. ResIST has the minimum depth '
      "that fits the paper's Table 1, or none. ResIST's rows are those of one "
      'random round, not a mean.'
    )
    head = ['protocol', 'exchange', 'format', 'GB predicted']
    head += ['GB in the compiled program', 'of local SGD, exact']
    if rows:
      yield Table(caption, record['command'], head, rows)


if __name__ == '__main__':
  main()
