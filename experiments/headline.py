"""The tables that the README begins with."""

from collections.abc import Sequence

from experiments import (
  digits,
  quantised,
  runs,
  slow_report,
  table2,
  to_accuracy,
)
from experiments.experiment import (
  Cell,
  Record,
  Results,
  of_runs,
  on_each_machine,
  seconds,
  spread,
)
from experiments.runs import conditions, load, machine
from experiments.table import Table

WORKERS = 4
BOTH = 'resist', 'local_sgd'  # Whose seconds are compared.
# Rows: name, protocol and recipe; and name, protocol, exchange and wire format.
LEARNED = (
  ('data parallel', 'data_parallel', to_accuracy.PLAIN),
  ('data parallel, half the steps', 'data_parallel', to_accuracy.HALF),
  (
    'data parallel, a quarter of the steps',
    'data_parallel',
    to_accuracy.QUARTER,
  ),
  ('local SGD', 'local_sgd', to_accuracy.PLAIN),
  ('local SGD, half the steps', 'local_sgd', to_accuracy.HALF),
  ('local SGD, outer momentum', 'local_sgd', to_accuracy.LEVERS),
  ('local SGD, outer momentum, half', 'local_sgd', to_accuracy.LEVERS_HALF),
  ('ResIST', 'resist', to_accuracy.PLAIN),
  ('ResIST, outer momentum', 'resist', to_accuracy.LEVERS),
  ('ResIST, outer momentum, twice', 'resist', to_accuracy.TWICE),
)
COSTS = (
  ('data parallel', 'data_parallel', 'all_reduce', 'float32'),
  ('local SGD', 'local_sgd', 'all_reduce', 'float32'),
  ('ResIST', 'resist', 'hand_over', 'float32'),
  ('ResIST, int8', 'resist', 'hand_over', 'int8'),
)


def tables() -> list[Table]:
  """Returns what is learned on CIFAR-10, and what a round costs."""
  return [*_learned(), *_costs()]


def _learned() -> list[Table]:
  results = Results(to_accuracy.EXPERIMENT.name, 'cpu90')
  found = {
    name: to_accuracy.Trained.find(
      results, 'cifar10', protocol, WORKERS, recipe
    )
    for name, protocol, recipe in LEARNED
  }
  where = to_accuracy.timed_on(to_accuracy.find_all(results))
  rows = [
    [name, results.percent(trained.cell), *trained.to_targets(where)]
    + [trained.in_all(where)]
    for name, trained in found.items()
    if trained.records
  ]
  if len(rows) < 2:  # One row compares nothing.
    return []
  runs = [record for trained in found.values() for record in trained.records]
  caption = (
    'Four workers share one machine and take equally many steps, unless the '
    'row says otherwise. *CIFAR-10* is the final test accuracy in %. The '
    'columns *to N %* give the seconds of training, and the GB sent by all '
    'workers, until a test first reaches N %; *in all* gives those of the '
    'whole run. '
    f'{of_runs(runs)}{to_accuracy.on_a_quiet(where)}'
    f'{to_accuracy.how_often(runs)}'
  )
  head = ['', 'CIFAR-10', *to_accuracy.TO_TARGETS, to_accuracy.IN_ALL]
  return [Table(caption, '', head, rows)]


def _costs() -> list[Table]:
  links = slow_report.load('paper_shares')
  link = '100 Mbit/s'
  if (link, 'data_parallel') not in links:
    return []
  rows, on_digits, on_gpu = [], [], []
  initial = _initial()
  where = _machine_of(initial)
  for name, protocol, exchange, wire_format in COSTS:
    exact = wire_format == 'float32'
    records = _paper_runs(protocol, initial) if exact else []
    results, run = _digits(protocol, wire_format)
    on_gpu += records
    on_digits += results.of(run)
    method = '_'.join(
      [protocol]
      + [exchange] * (protocol == 'resist')
      + [wire_format] * (wire_format != 'float32')
    )
    waited = slow_report.exchange_seconds(links, link, method)
    rows.append(
      [name, *_accuracy_and_seconds(records, where)]
      + [_sent(protocol, exchange, wire_format)]
      + ['' if waited is None else f'{waited:.2f} s', results.percent(run)]
    )
  waited_for = links[link, 'data_parallel']
  summary = waited_for['summary']
  millions, steps = summary['params_total'] / 1e6, summary['local_steps']
  values = table2.INITIAL[initial].replace(', ', ', with ', 1)
  dtypes = sorted({r['config']['model']['dtype'] for r in on_gpu})
  computed = f' in {" and ".join(dtypes)}' if dtypes else ''
  caption = (
    'Four workers. *CIFAR-100* is the test accuracy in %, and *training* the '
    "seconds of training. Both are of the paper's network and settings"
    f'{computed}{values}; all workers take turns on one device. '
    f'{of_runs(on_gpu)}{_timed_on(on_gpu, where)} '
    '*Sent in a round* is what all workers together '
    "send in 50 steps of the paper's ResNet101, read from the compiled "
    'programs. *Exchange* is the time that the exchanges of a round take on '
    f'links of {link} between four processes, for {millions:.1f} million '
    'parameters; data parallel training exchanges in each of '
    f'{steps} steps. Measured on {machine(waited_for["provenance"])}. '
    '*Digits* is the accuracy on handwritten digits. '
    f'{of_runs(on_digits)}'
  )
  head = ['', 'CIFAR-100', 'training', 'sent in a round']
  return [Table(caption, '', [*head, f'exchange, {link}', 'digits'], rows)]


def _paper_runs(protocol: str, initial: str) -> list[Record]:
  """Returns the runs of a protocol at the paper's scale."""
  cell = table2.cell('cifar100', protocol, WORKERS, initial)
  return Results('table2', 'paper', runs.RESULTS).of(cell)


def _initial() -> str:
  """Returns initial values that ResIST and local SGD both have runs with."""
  return next(
    (
      initial
      for initial in table2.INITIAL
      if all(_paper_runs(protocol, initial) for protocol in BOTH)
    ),
    '',
  )


def _timed_on(records: Sequence[Record], where: str) -> str:
  """Says whose seconds are shown if the runs are of several machines."""
  several = len({conditions(r['provenance']) for r in records}) > 1
  return f' *Training* was timed on {where}.' if several and where else ''


def _machine_of(initial: str) -> str:
  """Returns the machine whose seconds are shown; empty without one."""
  both = {name: _paper_runs(name, initial) for name in BOTH}
  return next(iter(on_each_machine(both)), '')


def _accuracy_and_seconds(records: Sequence[Record], where: str) -> list[str]:
  if not records:
    return ['', '']
  accuracies = [100 * r['summary']['test_accuracy'] for r in records]
  here = [r for r in records if conditions(r['provenance']) == where]
  trained = seconds(here)
  return [spread(accuracies), f'{trained:.0f} s' if trained else '']


def _digits(protocol: str, wire_format: str) -> tuple[Results, Cell]:
  """Returns a run on digits, and the results that hold it."""
  if protocol == 'data_parallel':
    return Results(digits.EXPERIMENT.name, 'cpu'), digits.cell(protocol)
  results = Results(quantised.EXPERIMENT.name, 'cpu')
  return results, quantised.cell('digits', protocol, wire_format)


def _sent(protocol: str, exchange: str, wire_format: str) -> str:
  """Returns what the compiled programs of a round send; '' without a result."""
  kind = protocol, exchange, wire_format, WORKERS
  for counted in load('table1/*.json'):
    for r in counted.get('compiled', ()):
      if (r['protocol'], r['exchange'], r['wire_format'], r['workers']) == kind:
        return f'{r["read"] / 1e9:.2f} GB'
  return ''
