"""Tables and figures of the runs of `protocols`, for `sections`.

python -m experiments.protocols_report
"""

from collections.abc import Iterator, Mapping, Sequence
import pathlib
import statistics
import sys
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.costs import Cost, Machine
from experiments.experiment import of_runs
from experiments.protocols import PROTOCOLS, stem
from experiments.runs import RESULTS, of_seeds, show_results
from experiments.table import Table
from resist_jax.report import colours, plots

Record = dict[str, Any]
Runs = Mapping[tuple[str, int], Sequence[Record]]  # By protocol and workers.
TITLES = {
  'language': 'A language model',
  'vision_transformer': 'A vision transformer',
}
UNITS = {'test_loss': 'nats', 'test_accuracy': '%'}
# A modest accelerator on a slow link; latency is left out.
MACHINE = Machine(flops=1e12, bandwidth=1e8, latency=0.0)
SETTING = 'a worker of 1 TFLOP/s with a link of 100 Mbit/s'
X_AXES = {'steps': 'steps', 'bytes': 'MB sent', 'seconds': 'predicted seconds'}


def load(name: str, results: pathlib.Path = RESULTS) -> dict[str, Runs]:
  """Returns the results of an experiment at the cpu scale.

  Args:
    name: A key of `TITLES`.
    results: The folder that holds the results of all experiments.

  Returns:
    For each set of data, its runs.
  """
  found: dict[str, dict[tuple[str, int], list[Record]]] = {}
  for record in of_seeds(results / name / 'cpu', ''):
    config = record['config']
    runs = found.setdefault(config['data'], {})
    key = config['protocol'], config['num_workers']
    runs.setdefault(key, []).append(record)
  return {
    data: dict(sorted(r.items(), key=_order)) for data, r in found.items()
  }


def _order(item) -> tuple[int, int]:
  protocol, S = item[0]
  return S, list(PROTOCOLS).index(protocol)


def seconds(record: Record) -> float | None:
  """Predicts the seconds of a round where each worker has a `MACHINE`.

  The seconds of the runs themselves are those of a machine that simulates all
  workers and does other work, too.

  Args:
    record: A result.

  Returns:
    Seconds of local training and of the exchanges, which do not overlap. None
    for a run on an accelerator, whose operations no compiler counted.
  """
  config, summary = record['config'], record['summary']
  if summary['flops_per_step'] is None:
    return None
  flops = config['local_steps'] * summary['flops_per_step']
  sent = summary['bytes_per_round'] / config['num_workers']
  return Cost(flops, sent, 0).seconds(MACHINE)['round']


def tables(name: str, results: pathlib.Path = RESULTS) -> Iterator[Table]:
  """Yields a table for each set of data that has results.

  Args:
    name: A key of `TITLES`.
    results: See `load`.

  Yields:
    The tables.
  """
  for runs in load(name, results).values():
    records = [record for found in runs.values() for record in found]
    tested = [k for k in UNITS if k in records[0]['summary']]
    rows = []
    for (protocol, S), found in runs.items():
      # All seeds compute as much, but no compiler counts it on accelerators.
      record = next((r for r in found if seconds(r)), found[0])
      summary, flops = record['summary'], record['summary']['flops_per_step']
      total = (seconds(record) or 0) * record['config']['rounds']
      rows.append(
        [str(S), PROTOCOLS[protocol]]
        + [_spread([r['summary'][key] for r in found], key) for key in tested]
        + [f'{summary["params_per_worker"] / summary["params_total"]:.0%}']
        + [f'{flops / 1e9:.2g}' if flops else '']
        + [f'{found[0]["curve"][-1]["bytes"] / 1e6:,.0f}']
        + [f'{total:.3g}' if total else '']
      )
    head = ['S', 'protocol']
    head += [f'{k.replace("_", " ")}, {UNITS[k]}' for k in tested]
    head += ['weights on a worker', 'GFLOP a step', 'MB sent', 'seconds']
    yield Table(_caption(records), f'python -m experiments.{name}', head, rows)


def _spread(values: Sequence[float], key: str) -> str:
  """Formats the mean and the deviation over seeds."""
  scale, digits = (100, 1) if UNITS[key] == '%' else (1, 3)
  values = [scale * value for value in values]
  mean = f'{statistics.mean(values):.{digits}f}'
  if len(values) == 1:
    return mean
  return f'{mean} ± {statistics.stdev(values):.{digits}f}'


def _caption(records: Sequence[Record]) -> str:
  config, summary = records[0]['config'], records[0]['summary']
  shape = config['shape']
  share = summary['params_in_blocks'] / summary['params_total']
  what = (
    f"bytes of Python's standard library, windows of {shape['length']} bytes"
    if config['data'] == 'python'
    else f'{config["data"]}, windows of {shape["length"]} bytes'
    if 'text_bytes' in config
    else f'{config["data"]}, images in {shape["length"]} patches'
  )
  return (
    f'A transformer of {shape["layers"]} blocks of width {shape["width"]} '
    f'({summary["params_total"]:,} parameters, {share:.0%} in blocks) learns '
    f'{what}. Each protocol takes {config["rounds"]} rounds of '
    f'{config["local_steps"]} steps on every worker, by AdamW with clipped '
    'gradients, '
    f'{config["batch"]} examples in each step. DiLoCo is local SGD with an '
    "outer optimiser, SGD with Nesterov momentum (0.9, rate 0.7). AdamW's "
    'moments restart in each round, but not in data parallel training. '
    'ResIST multiplies its branches by 1 / S in tests, or, with the scale in '
    'training, by S in training. "MB sent" is what all workers send in the run '
    'when each has its own device. "Seconds" are predicted for '
    f'{SETTING}, not measured: one machine simulated all workers. '
    f'{of_runs(records)}'
  )


def figures(name: str, results: pathlib.Path = RESULTS) -> dict[str, Figure]:
  """Draws the test loss against steps, bytes and predicted seconds.

  Args:
    name: A key of `TITLES`.
    results: See `load`.

  Returns:
    Figures by name.
  """
  return {
    f'loss_{stem(data)}': _figure(runs)
    for data, runs in load(name, results).items()
  }


def _figure(runs: Runs) -> Figure:
  workers = sorted({S for _, S in runs})
  # Narrow, so that letters can be read where a picture is 400 pixels wide.
  figure = Figure(figsize=(6.6, 0.8 + 2 * len(workers)), layout='constrained')
  every = figure.subplots(
    len(workers), 3, sharex='col', sharey=True, squeeze=False
  )
  looks = dict(
    zip(PROTOCOLS, colours.styles(map(_kind, PROTOCOLS)), strict=True)
  )
  for S, line in zip(workers, every, strict=True):
    for axes, x in zip(line, X_AXES, strict=True):
      for (protocol, count), found in runs.items():
        if count == S and (curve := _curve(found, x)):
          axes.plot(
            *curve,
            label=PROTOCOLS[protocol],
            markersize=2.5,
            linewidth=1.2,
            **looks[protocol].look,
          )
      axes.set_xlabel(X_AXES[x] if workers[-1] == S else '')
      plots.style_axes(axes)
      if x != 'steps':
        axes.set_xscale('log')
        axes.xaxis.set_major_locator(LogLocator(numticks=5))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter('{x:,g}')
    line[0].set_ylabel(f'test loss, {S} workers')
  handles = {}
  for axes in every[:, 0]:
    handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
  figure.legend(
    handles.values(),
    handles.keys(),
    loc='outside lower center',
    ncols=3,
    frameon=False,
  )
  return figure


def _kind(name: str) -> str:
  """Returns which of the three protocols a variant is one of."""
  if name == 'diloco':
    return 'local_sgd'
  return next(kind for kind in colours.PROTOCOLS if name.startswith(kind))


def _curve(
  found: Sequence[Record], x: str
) -> tuple[list[float], list[float]] | None:
  """Returns a cost, and the mean over seeds of the test loss.

  None if nobody knows the cost.
  """
  curves = [record['curve'] for record in found]
  rounds = [row['round'] for row in curves[0]]
  losses = [
    statistics.mean(row['test_loss'] for row in rows)
    for rows in zip(*curves, strict=True)
  ]
  a_round = next(filter(None, map(seconds, found)), None)
  if x == 'seconds' and a_round is None:
    return None
  costs = {
    'steps': [row['steps'] for row in curves[0]],
    'bytes': [row['bytes'] / 1e6 for row in curves[0]],
    'seconds': [done * (a_round or 0) for done in rounds],
  }
  return costs[x], losses


def _all_tables(results: pathlib.Path) -> Iterator[Table]:
  for name in TITLES:
    yield from tables(name, results)


def _drawn(results: pathlib.Path) -> dict[pathlib.Path, Figure]:
  return {
    results / name / 'cpu' / f'{title}.png': figure
    for name in TITLES
    for title, figure in figures(name, results).items()
  }


def main() -> int:
  """Shows the results of a folder; returns the exit code."""
  return show_results(__doc__, _all_tables, _drawn)


if __name__ == '__main__':
  sys.exit(main())
