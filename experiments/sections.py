"""The tables and pictures of all committed results, in order.

README.md, RESULTS.md and the page of `experiments.site` are made from them.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

from matplotlib.figure import Figure

from experiments import (
  ablation,
  checkpoint_cost,
  claims,
  deeper,
  digits,
  ensemble,
  healthy,
  levers,
  local_iterations,
  protocols_report,
  quantised,
  slow_network,
  slow_report,
  storm,
  table2,
  table3,
  tfds_catalog,
  to_accuracy,
)
from experiments.claims import Claim
from experiments.compile import tables as compiled
from experiments.experiment import Results, machine
from experiments.pictures import Picture
from experiments.runs import RESULTS, load
from experiments.table import Table

EXPERIMENTS = tuple(
  module.EXPERIMENT
  for module in (
    to_accuracy,
    table2,
    table3,
    digits,
    ablation,
    levers,
    local_iterations,
    quantised,
    ensemble,
    deeper,
    healthy,
  )
)
SCALES = ('paper', 'cpu90', 'cpu')  # Smoke runs only show that a command works.
COUNTS, WIRE = "The paper's count of bytes (Table 1)", 'On the wire'
INTRODUCTION = (
  'These are the results of this implementation beside those that the paper '
  'reports (C. Dun, C. R. Wolfe, C. M. Jermaine, A. Kyrillidis, UAI 2022). '
  'Every number comes from a result file that is kept with the code, together '
  'with its configuration, seed, commit, versions and machine. The command '
  'above a table makes its result files again, and those that are still '
  'missing; --only=NAME makes one. Where a command skips what has a result, '
  'give it an empty folder (--results=FOLDER), or delete the result '
  'file if it has no such option.',
  'At the cpu scale, a network with an eighth of the width trains for two '
  'epochs on two cores. Do not compare its accuracies with those of the paper. '
  'A number without ± is one run; ± is the standard deviation over two or '
  'three seeds. Differences of less than a point, or between fewer than three '
  'seeds, do not rank two methods.',
  'Two accuracies are reported. "Deployed" is the accuracy of the global '
  'network with fixed normalisation statistics, measured over training images '
  'after training, as a deployed model would have them. "Test-batch '
  'statistics" normalises each test batch with its own statistics, as the '
  'paper does.',
)


@dataclasses.dataclass(frozen=True)
class Section:
  """Tables and pictures under a title.

  Attributes:
    title: For readers.
    tables: At least one.
    figures: Pictures, made now, by name; empty where nobody asked for them.
    pictures: The committed files of the same pictures.
    claims: What the paper claims, and what the results say about it.
  """

  title: str
  tables: list[Table]
  figures: Mapping[str, Picture | Figure] = dataclasses.field(
    default_factory=dict
  )
  pictures: Sequence[pathlib.Path] = ()
  claims: Sequence[Claim] = ()


def sections(with_figures: bool = False) -> Iterator[Section]:
  """Yields a section for each experiment that has results.

  Args:
    with_figures: Whether to draw the pictures, too.

  Yields:
    The sections.
  """
  for experiment in EXPERIMENTS:
    for scale in (s for s in SCALES if s in experiment.scales):
      results = Results(experiment.name, scale)
      tables = list(experiment.tables(results))
      if tables:
        figures = experiment.pictures(results) if with_figures else {}
        pictures = sorted(results.folder().glob('*.png'))
        title = experiment.title
        if scale != 'cpu':
          title += f', {scale} scale'
        judge = claims.OF_EXPERIMENT.get(experiment.name)
        judged = judge(results) if judge else []
        yield Section(title, tables, figures, pictures, judged)
  slow = slow_report.tables()
  if slow:
    figures = slow_report.figures() if with_figures else {}
    pictures = sorted(slow_network.FOLDER.glob('*.png'))
    judged = claims.slow_links()
    yield Section('Slow links', slow, figures, pictures, judged)
  for name, title in protocols_report.TITLES.items():
    tables = list(protocols_report.tables(name))
    if tables:
      figures = protocols_report.figures(name) if with_figures else {}
      pictures = sorted((RESULTS / name / 'cpu').glob('*.png'))
      yield Section(title, tables, figures, pictures)
  judged_by_title = {COUNTS: claims.counts(), WIRE: claims.wire()}
  for title, tables in (
    ('On an accelerator', [*_accelerator(), *_accelerator_speed()]),
    ('Compiled for accelerators', list(compiled.tables())),
    (COUNTS, list(_counts())),
    (WIRE, list(_wire())),
    ('Workers of unequal speed', list(_unequal())),
    ('Hosts that are lost', [*storm.tables(), *checkpoint_cost.tables()]),
    ('Memory', list(_memory())),
    ('Speed', [*_benches(), *_peer()]),
    ('Sets of the TFDS catalog', list(_catalog())),
  ):
    if tables:
      judged = judged_by_title.get(title, [])
      yield Section(title, tables, claims=judged)


def _accelerator() -> Iterator[Table]:
  """Rounds on an accelerator beside the same rounds on a CPU."""
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


def _accelerator_speed() -> Iterator[Table]:
  for r in load('bench/*_torch.json'):
    rows = []
    for network in r['results']:
      flop = {
        x['blocks']: (x['flop_per_second'], x['flop_per_second_of_matmul'])
        for record in load('bench/*_bfloat16_*.json')
        if 'results' in record and record['provenance'] == r['provenance']
        for x in record['results']
        if 'flop_per_second' in x
      }
      ours, peak = flop[network['blocks']]
      theirs = {
        name: seconds
        for name, seconds in network['torch_seconds'].items()
        if 'again' not in name
      }
      eager = min(v for k, v in theirs.items() if 'compiled' not in k)
      graphs = theirs.get('compiled, reduce-overhead')
      rows.append(
        [
          f'{network["network"]}, {network["blocks"]} blocks',
          f'{1e3 * network["jax_seconds"]:.2f} ms',
          f'{ours / 1e12:.0f} TFLOP/s',
          f'{ours / peak:.0%}',
          f'{1e3 * eager:.2f} ms',
          f'{1e3 * graphs:.2f} ms' if graphs else '',
        ]
      )
    torch = r['versions']['torch']
    caption = (
      "A step of the paper's networks in bfloat16, batch size "
      f'{r["batch_size"]}, {machine(r["provenance"], count=False)}, and of '
      f'PyTorch {torch} '
      'with automatic mixed precision. "Share of a product" is the rate '
      'divided by that of a large product of matrices on the same device. '
      'PyTorch compiled uses CUDA graphs; the full network was not compiled. '
      'Medians of calls of 20 steps. The full network takes --workers=1.'
    )
    head = ['network', 'JAX', 'rate', 'share of a product', 'PyTorch, eager']
    head.append('PyTorch, compiled')
    command = (
      'python -m experiments.torch_peer --torch=PYTHON --workers=4 '
      f'--batch_size={r["batch_size"]} --dtype={r["dtype"]} --steps=20 '
      '--compile --out=FILE'
    )
    yield Table(caption, command, head, rows)


def _counts() -> Iterator[Table]:
  """The paper's Table 1, from the sizes of its network."""
  for record in load('table1/*.json'):
    names = table2.NAMES
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
    yield Table(caption, 'python -m experiments.table1', head, rows)


def _wire() -> Iterator[Table]:
  """What the exchanges of the paper's network send, as compiled."""
  for record in load('table1/*.json'):
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
      'Gigabytes that four workers, a device each, send in one round of the '
      "paper's ResNet101: as predicted, and as read from the compiled program. "
      'Data parallel takes 50 steps in the round. ResIST has the minimum depth '
      "that fits the paper's Table 1, or none. ResIST's rows are those of one "
      'random round, not a mean.'
    )
    head = ['protocol', 'exchange', 'format', 'GB predicted']
    head += ['GB in the compiled program', 'of local SGD, exact']
    yield Table(caption, record['command'], head, rows)


def _unequal() -> Iterator[Table]:
  for r in load('unequal/*.json'):
    rows = [
      [name, ' and '.join(map(str, r['runs'][name][-1]['blocks']))]
      + [f'{seconds:.2f} s']
      for name, seconds in r['seconds_round'].items()
    ]
    caption = (
      'Seconds of a round of two processes with a core each, on handwritten '
      'digits. The second process is paused so often that it has '
      f'{r["speed_of_process_1"]:.0%} of the speed of the first. Medians of '
      f'{len(next(iter(r["runs"].values())))} alternating runs on '
      f'{machine(r["provenance"])}.'
    )
    yield Table(caption, r['command'], ['depths', 'blocks', 'a round'], rows)


def _memory() -> Iterator[Table]:
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


def _catalog() -> Iterator[Table]:
  for record in load('tfds_catalog/*.json'):
    yield from tfds_catalog.tables(record)


def _benches() -> Iterator[Table]:
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


def _peer() -> Iterator[Table]:
  alike: dict[Any, list[Any]] = {}
  for r in [*load('bench/peer_*.json'), *load('bench/*torch_*.json')]:
    where = machine(r['provenance'], count=False)
    precision = '' if r['precision'] == 'highest' else r['precision']
    key = where, r['batch_size'], r['blocks'], precision or r['dtype']
    alike.setdefault(key, []).append(r)
  for key, records in alike.items():
    yield _beside_torch(key, records)


def _beside_torch(key, records) -> Table:
  where, batch_size, blocks, precision = key
  first = records[0]
  on_cpu = first['provenance']['device'].endswith(' cpu')
  goal = 'The goal was a ratio of at most 1.2. ' if on_cpu else ''
  kept = (
    ' "Kept": the C library of both keeps the memory of a step for the next '
    'one, as docs/running.md says.'
  )
  caption = (
    f"One step of the paper's sub-ResNet ({blocks} blocks, batch size "
    f'{batch_size}{"" if on_cpu else f", {precision}"}) here and in plain '
    f'PyTorch. {goal}Medians of {first["runs"]} alternating runs, and of their '
    f'ratios, {where}.{kept if on_cpu else ""}'
  )
  rows = []
  for r in records:
    keeps = 'MALLOC_TRIM_THRESHOLD_' in r['provenance'].get('environment', {})
    times = [r[k] for k in ('jax_seconds', 'torch_seconds')]
    rows.append(
      ([('freed', 'kept')[keeps]] if on_cpu else [r['versions']['torch']])
      + [f'{x:.2f}' if on_cpu else f'{x:.5f}' for x in times]
      + [f'{r["ratio"]:.2f}']
    )
  head = ['JAX, seconds', 'PyTorch, seconds', 'ratio']
  head = ['memory' if on_cpu else 'PyTorch', *head]
  return Table(caption, first['command'], head, rows)
