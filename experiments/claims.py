"""Which claims of the paper the result files bear out, by a rule.

Nothing here knows an outcome: each verdict is worked out from result files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import itertools
import statistics
from typing import Any, NamedTuple

from experiments import (
  ablation,
  deeper,
  digits,
  ensemble,
  local_iterations,
  paper,
  quantised,
  slow_report,
  table2,
  table3,
)
from experiments.experiment import Cell, Results, seconds
from experiments.runs import load
from resist_jax.report.compare import POINTS, RULE, compare

HOLDS, IN_PART, FAILS = 'holds', 'holds in part', 'does not hold'
UNDECIDED, UNTESTED = 'undecided', 'untested'
VERDICTS = (HOLDS, IN_PART, FAILS, UNDECIDED, UNTESTED)
_SECONDS = 0.1  # Times that differ by less than this share rank nothing.
RULES = (
  f'{RULE} Seconds are ranked if they differ by at least {_SECONDS:.0%}. Bytes '
  'are counted, so any difference ranks them.',
  f'A claim "{HOLDS}" if every setting of it that has results speaks for it, '
  f'"{IN_PART}" if some do and others are undecided, and "{FAILS}" if one '
  f'speaks against it. It is "{UNDECIDED}" if there are results that rank '
  f'nothing, and "{UNTESTED}" without results.',
)
Pairs = Mapping[str, tuple[Sequence[float], Sequence[float]]]
Numbers = dict[str, tuple[float | None, float | None]]


@dataclasses.dataclass(frozen=True)
class Claim:
  """A claim and what the result files say about it.

  Attributes:
    text: The claim.
    verdict: One of `VERDICTS`.
    found: The numbers behind the verdict; plain text.
    scale: At which scale; see `experiment.SCALES`.
  """

  text: str
  verdict: str
  found: str
  scale: str


class Judged(NamedTuple):
  """What a setting says about a claim.

  Attributes:
    found: The setting and its numbers.
    speaks: `HOLDS`, `FAILS` or `UNDECIDED`.
    why: By which part of the rule; may be empty.
  """

  found: str
  speaks: str
  why: str = ''


def accuracy(text: str, pairs: Pairs, wanted: set[str], scale: str) -> Claim:
  """Judges a claim that some accuracies compare to others in a certain way.

  Args:
    text: The claim.
    pairs: By setting, the accuracies in % of the seeds of both sides.
    wanted: The verdicts of `compare` that speak for the claim.
    scale: Where the results come from.
  """
  judged = []
  for setting, (ours, theirs) in pairs.items():
    found = compare(ours, theirs)
    if found.verdict == 'untested':
      continue
    speaks, why = UNDECIDED, found.why
    if found.verdict != 'undecided':
      speaks = HOLDS if found.verdict in wanted else FAILS
    elif abs(found.points) >= POINTS:
      side = 'ahead' if found.points > 0 else 'behind'
      way = 'towards' if side in wanted else 'against'
      why += f', but lean{_s(why)} {way} it'
    means = [f'{statistics.mean(x):.1f}' for x in (ours, theirs)]
    judged.append(Judged(f'{setting}: {" against ".join(means)}', speaks, why))
  return _claim(text, judged, len(pairs), scale)


def _s(why: str) -> str:
  return 's' if why.startswith('one ') else ''


def smaller(
  text: str,
  pairs: Numbers,
  unit: str,
  scale: str,
  margin: float = 0,
) -> Claim:
  """Judges a claim that some numbers are smaller than others.

  Args:
    text: The claim.
    pairs: By setting, both numbers; None without a result.
    unit: Unit of the numbers.
    scale: Where the results come from.
    margin: The share of the larger one by which they differ, or rank nothing.
  """
  judged = []
  for setting, (ours, theirs) in pairs.items():
    if ours is None or theirs is None:
      continue
    speaks, why = HOLDS if ours < theirs else FAILS, ''
    if margin and abs(ours - theirs) < margin * max(ours, theirs):
      speaks, why = UNDECIDED, f'less than {margin:.0%} apart'
    numbers = f'{ours:.3g} against {theirs:.3g} {unit}'
    judged.append(Judged(f'{setting}: {numbers}', speaks, why))
  return _claim(text, judged, len(pairs), scale)


def _claim(
  text: str, judged: Sequence[Judged], count: int, scale: str
) -> Claim:
  """Returns a claim with the verdict that the settings give together."""
  said = {setting.speaks for setting in judged}
  if not judged:
    return Claim(text, UNTESTED, 'There is no result.', scale)
  if FAILS in said:
    verdict = FAILS
  elif said == {HOLDS}:
    verdict = HOLDS
  else:
    verdict = IN_PART if HOLDS in said else UNDECIDED
  groups: dict[str, list[str]] = {}
  for setting in judged:
    own = setting.speaks if setting.speaks != verdict else ''
    note = ': '.join(filter(None, (own, setting.why)))
    groups.setdefault(note, []).append(setting.found)
  parts = [
    '; '.join(found) + (f' ({note})' if note else '')
    for note, found in groups.items()
  ]
  if count > len(judged):
    parts.append(f'{count - len(judged)} more without results')
  return Claim(text, verdict, f'{"; ".join(parts)}.', scale)


def _values(results: Results, cell: Cell) -> list[float]:
  return [100 * v for v in results.values(cell, 'test_accuracy')]


def _pair(
  results: Results, ours: Cell, theirs: Cell
) -> tuple[list[float], list[float]]:
  return _values(results, ours), _values(results, theirs)


AS_GOOD, BETTER = {'level', 'ahead'}, {'ahead'}


def _digits(results: Results) -> list[Claim]:
  cells = {name: digits.cell(name) for name in table2.NAMES}
  resist = cells['resist']
  return [
    accuracy(
      f'On digits, ResIST loses less than {POINTS:g} point to local SGD (the '
      'paper has no digits).',
      {'digits': _pair(results, resist, cells['local_sgd'])},
      AS_GOOD,
      results.scale,
    ),
    accuracy(
      'On digits, data parallel training is better than ResIST at four '
      'workers (not a claim of the paper).',
      {'digits': _pair(results, cells['data_parallel'], resist)},
      BETTER,
      results.scale,
    ),
  ]


def _table2(results: Results) -> list[Claim]:
  cell = table2.cell
  return [
    accuracy(
      f'On CIFAR, ResIST loses less than {POINTS:g} point to local SGD.',
      {
        f'{title}, {S} workers': _pair(
          results, cell(data, 'resist', S), cell(data, 'local_sgd', S)
        )
        for data, title in table2.DATA.items()
        for S in table2.WORKERS
      },
      AS_GOOD,
      results.scale,
    ),
    accuracy(
      f'On CIFAR, ResIST with eight workers loses less than {POINTS:g} point '
      'to ResIST with two.',
      {
        title: _pair(results, cell(data, 'resist', 8), cell(data, 'resist', 2))
        for data, title in table2.DATA.items()
      },
      AS_GOOD,
      results.scale,
    ),
    accuracy(
      'On CIFAR, data parallel training is better than ResIST at four workers '
      '(not a claim of the paper).',
      {
        title: _pair(
          results, cell(data, 'data_parallel', 4), cell(data, 'resist', 4)
        )
        for data, title in table2.DATA.items()
      },
      BETTER,
      results.scale,
    ),
  ]


def _table3(results: Results) -> list[Claim]:
  pairs: Numbers = {}
  for data, title in table2.DATA.items():
    for S in table2.WORKERS:
      name = f'{title}, {S} workers'
      pairs[name] = None, None
      # Initial values change no seconds.
      groups = [
        table3.each_group(results, data, S, initial)
        for initial in table2.INITIAL
      ]
      for group in itertools.chain(*groups):
        runs = group.runs
        times = seconds(runs['resist']), seconds(runs['local_sgd'])
        values = table2.INITIAL[group.initial]
        pairs[f'{name}{values}, {group.machine}'] = times
        pairs.pop(name, None)
  text = 'ResIST trains faster than local SGD.'
  return [smaller(text, pairs, 's', results.scale, _SECONDS)]


def _ablation(results: Results) -> list[Claim]:
  """The columns of the paper's ablation that add a point or more."""
  made = []
  for workers, columns in ablation.COLUMNS.items():
    cells = ablation.columns(workers, results.scale)
    near = ablation.closer(workers, results.scale)
    theirs, names = paper.ABLATION[workers], list(columns)
    for before, after in itertools.pairwise(names):
      if theirs[after] - theirs[before] < POINTS:
        continue
      old, new = ablation.TITLES[before], ablation.TITLES[after]
      if not {old, new} <= cells.keys():  # The scale cpu90 has fewer columns.
        continue
      pairs = {'CIFAR-10': _pair(results, cells[new], cells[old])}
      for title, cell in near.items():
        column, _, setting = title.partition(', ')
        if column == new:
          other = near[f'{old}, {setting}']
          pairs[setting] = _pair(results, cell, other)
      text = (
        f'With {workers} workers, "{new}" helps (in the paper from '
        f'{theirs[before]} to {theirs[after]}).'
      )
      made.append(accuracy(text, pairs, BETTER, results.scale))
  return made


def _local_iterations(results: Results) -> list[Claim]:
  scale = results.scale
  often = min(steps for steps in local_iterations.SWEEP[scale] if steps)
  pairs = {}
  for S in local_iterations.WORKERS[scale]:
    for protocol in local_iterations.PROTOCOLS:
      ours, never = (
        local_iterations.cell(protocol, S, steps, scale) for steps in (often, 0)
      )
      name = f'{table2.NAMES[protocol]}, {S} workers, every {often} steps'
      pairs[name] = _pair(results, ours, never)
  text = 'Workers that synchronise often end better than workers that never do.'
  return [accuracy(text, pairs, BETTER, scale)]


def _quantised(results: Results) -> list[Claim]:
  pairs = {
    title: _pair(
      results,
      quantised.cell(data, 'resist', 'int8'),
      quantised.cell(data, 'resist', 'float32'),
    )
    for data, title in quantised.DATA.items()
    if data != 'digits' or results.scale != 'paper'
  }
  text = f'Eight bits lose less than {POINTS:g} point to float32.'
  return [accuracy(text, pairs, AS_GOOD, results.scale)]


def _ensemble(results: Results) -> list[Claim]:
  pairs = {
    title: _pair(
      results, table2.cell(data, 'resist', 8), ensemble.cell(data, 8)
    )
    for data, title in table2.DATA.items()
  }
  text = (
    'With eight workers, ResIST is at least as good as an ensemble of as many '
    'sub-networks that never synchronise.'
  )
  return [accuracy(text, pairs, AS_GOOD, results.scale)]


def _deeper(results: Results) -> list[Claim]:
  times, learned = {}, {}
  for data, S in deeper.RUNS[results.scale]:
    for depth in deeper.DEPTHS:
      cells = [deeper.cell(data, depth, p, S) for p in ('resist', 'local_sgd')]
      name = f'{table2.DATA[data]}, ResNet{depth}, {S} workers'
      pairs = deeper.compared(results, data, depth, S)
      times |= {f'{name}, {k}': both[::-1] for k, both in pairs.items()}
      if not pairs:
        times[name] = None, None
      learned[name] = _pair(results, *cells)
  scale = results.scale
  return [
    smaller(
      'ResIST trains deeper networks faster than local SGD.',
      times, 's', scale, _SECONDS,
    ),
    accuracy(
      f'In deeper networks, ResIST loses less than {POINTS:g} point to local '
      'SGD.',
      learned, AS_GOOD, scale,
    ),
  ]  # fmt: skip


# By experiment, what judges its claims.
OF_EXPERIMENT: dict[str, Callable[[Results], list[Claim]]] = {
  'digits': _digits,
  'table2': _table2,
  'table3': _table3,
  'ablation': _ablation,
  'local_iterations': _local_iterations,
  'quantised': _quantised,
  'ensemble': _ensemble,
  'deeper': _deeper,
}


def _table1() -> dict[str, Any] | None:
  return next(iter(load('table1/*.json')), None)


def counts() -> list[Claim]:
  """Judges whether the bytes of the paper's Table 1 come out."""
  record = _table1() or {'paper': {}, 'ours': {}}
  off = {
    f'{table2.NAMES[protocol]}, {workers} workers': abs(
      record['ours'][protocol][workers] / theirs - 1
    )
    for protocol, by_workers in record['paper'].items()
    for workers, theirs in by_workers.items()
  }
  worst = max(off, key=lambda name: off[name], default='')
  judged = []
  if worst:
    told = f'{len(off)} numbers differ by {off[worst]:.1%} at most, at {worst}'
    judged = [Judged(told, HOLDS if off[worst] <= 0.01 else FAILS)]
  text = 'A round sends as many bytes as Table 1 says, within 1%.'
  return [_claim(text, judged, 1, 'paper')]


def sent() -> tuple[float, float] | None:
  """Returns the GB that four workers send in a round of the paper's network.

  Returns:
    Those of ResIST and of local SGD, read from compiled programs; None without
    a result.
  """
  record = _table1()
  read = {
    (r['protocol'], r['exchange'], r['wire_format'], r['workers']): r['read']
    for r in (record or {}).get('compiled', ())
  }
  ours = read.get(('resist', 'hand_over', 'float32', 4))
  theirs = read.get(('local_sgd', 'all_reduce', 'float32', 4))
  return (ours / 1e9, theirs / 1e9) if ours and theirs else None


def wire() -> list[Claim]:
  """Judges whether ResIST sends less, in the compiled programs."""
  text = 'A round of ResIST sends less than a round of local SGD.'
  pairs: Numbers = {'4 workers': sent() or (None, None)}
  return [smaller(text, pairs, 'GB', 'paper')]


def slow_links() -> list[Claim]:
  """Judges whether ResIST exchanges faster on slow links."""
  records, method = slow_report.load('paper_shares'), 'resist_hand_over'
  links = dict.fromkeys(link for link, _ in records if link != 'no limit')
  pairs = {
    link: (
      slow_report.exchange_seconds(records, link, method),
      slow_report.exchange_seconds(records, link, 'local_sgd'),
    )
    for link in links
    if slow_report.beside(records, link, method)
  }
  text = 'On slow links, ResIST exchanges faster than local SGD.'
  return [smaller(text, pairs, 's', 'cpu', _SECONDS)]


def every() -> Iterator[Claim]:
  """Yields all claims at all scales, those without results included."""
  scales = {'digits': ['cpu'], 'ablation': ['paper', 'cpu', 'cpu90']}
  for name, judge in OF_EXPERIMENT.items():
    for scale in scales.get(name, ['paper', 'cpu']):
      yield from judge(Results(name, scale))
  yield from (*slow_links(), *counts(), *wire())
