"""What all committed results say, in the order in which a reader wants it.

The README and the page of results are made of these sections.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import json
from typing import Any

from matplotlib.figure import Figure

from experiments import (
  ablation,
  deeper,
  digits,
  ensemble,
  local_iterations,
  quantised,
  slow_report,
  table2,
  table3,
)
from experiments.experiment import Results, machine
from experiments.runs import RESULTS
from experiments.table import Table

EXPERIMENTS = tuple(
  module.EXPERIMENT
  for module in (
    digits,
    table2,
    table3,
    ablation,
    local_iterations,
    quantised,
    ensemble,
    deeper,
  )
)
SCALES = ('paper', 'cpu')  # Smoke proves that a command works, nothing else.


@dataclasses.dataclass(frozen=True)
class Section:
  """Tables and pictures under a title."""

  title: str
  tables: list[Table]
  figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)


def sections(with_figures: bool = False) -> Iterator[Section]:
  """Yields what there are results for.

  Args:
    with_figures: Draw the pictures, too.

  Yields:
    The sections.
  """
  for experiment in EXPERIMENTS:
    for scale in SCALES:
      results = Results(experiment.name, scale)
      tables = list(experiment.tables(results))
      if tables:
        figures = experiment.pictures(results) if with_figures else {}
        yield Section(experiment.title, tables, figures)
  slow = slow_report.tables()
  if slow:
    figures = slow_report.figures() if with_figures else {}
    yield Section('Slow links', slow, figures)
  for title, tables in (
    ("The paper's count of bytes (Table 1)", list(_counts())),
    ('On the wire', list(_wire())),
    ('Workers of unequal speed', list(_unequal())),
    ('Memory', list(_memory())),
    ('Speed', [*_benches(), *_peer()]),
  ):
    if tables:
      yield Section(title, tables)


def _load(pattern: str) -> list[dict[str, Any]]:
  return [
    json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))
  ]


def _counts() -> Iterator[Table]:
  """The paper's Table 1, from the sizes of its network."""
  for record in _load('table1/*.json'):
    names = table2.NAMES
    rows = [
      [names[protocol], workers, f'{record["ours"][protocol][workers]:.3f}']
      + [f'{theirs:.3f}']
      for protocol, by_workers in record['paper'].items()
      for workers, theirs in by_workers.items()
    ]
    caption = (
      'GB of float32 parameters that workers fetch and bring back in a round, '
      "the paper's ResNet101 on CIFAR-100."
    )
    head = ['protocol', 'workers', 'ours', 'the paper']
    yield Table(caption, 'python -m experiments.table1', head, rows)


def _wire() -> Iterator[Table]:
  """What the exchanges of the paper's network send, as compiled."""
  for record in _load('table1/*.json'):
    exact = record['wire']['local_sgd']['all_reduce']['float32']
    rows = []
    for r in record['compiled']:
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
      "What one round of the paper's ResNet101 puts on the wire, four workers "
      'together, one device each (T = 50 for data parallel); ResIST with the '
      "minimum depth that fits the paper's Table 1, and without one. One round "
      'drawn, not the mean.'
    )
    head = ['protocol', 'exchange', 'format', 'GB predicted']
    head += ['GB in the compiled program', 'of local SGD, exact']
    yield Table(caption, record['command'], head, rows)


def _unequal() -> Iterator[Table]:
  for r in _load('unequal/*.json'):
    rows = [
      [name, ' and '.join(map(str, r['runs'][name][-1]['blocks']))]
      + [f'{seconds:.2f} s']
      for name, seconds in r['seconds_round'].items()
    ]
    caption = (
      'Two processes on a core each, the second stopped so often that it has '
      f'{r["speed_of_process_1"]:.0%} of the speed; handwritten digits, '
      f'medians of {len(next(iter(r["runs"].values())))} runs in turn, '
      f'{machine(r["provenance"])}.'
    )
    yield Table(caption, r['command'], ['depths', 'blocks', 'a round'], rows)


def _memory() -> Iterator[Table]:
  for r in _load('memory/*.json'):
    names = ('chain_bytes', 'budget_bytes', 'bound_bytes')
    names = (*names, 'parameter_bytes_per_device')
    caption = (
      'A chain that fits on no device, trained, tested, saved and resumed: MiB '
      'of the chain, of what a device may hold, of what one held at most '
      '(arrays and scratch, data included), and of its parameters.'
    )
    head = ['the chain', 'budget', 'held', 'parameters']
    row = [f'{r[name] / 2**20:.0f}' for name in names]
    yield Table(caption, 'python -m experiments.memory', head, [row])


def _benches() -> Iterator[Table]:
  for record in _load('bench/*_both.json'):
    kinds = record['results'][0]['exchange_share_of_round_at_T_50']
    head = ['network', "step of a worker's sub-network"]
    head += ['over a bare jitted step']
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
      f'Speed in {first["dtype"]}, {first["workers"]} workers on '
      f'{first["devices"]} devices, {machine(record["provenance"])}; the '
      'exchanges are shares of a round of 50 steps.'
    )
    yield Table(caption, record['command'], head, rows)


def _peer() -> Iterator[Table]:
  for r in _load('bench/peer_*.json'):
    caption = (
      "One step of the paper's sub-ResNet (11 blocks, batch "
      f'{r["batch_size"]}) here and in plain PyTorch; the aim was 1.2. Medians '
      f'of {r["runs"]} runs in turn, {machine(r["provenance"])}.'
    )
    row = [f'{r[key]:.2f}' for key in ('jax_seconds', 'torch_seconds', 'ratio')]
    head = ['JAX, seconds', 'PyTorch, seconds', 'times as long']
    yield Table(caption, r['command'], head, [row])
