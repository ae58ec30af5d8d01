"""Makes the README's results from the committed result files.

python -m experiments.readme
"""

from collections.abc import Sequence
import json
import pathlib
import statistics
from typing import Any

from experiments import wire_formats
from experiments.wire_formats import spread

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / 'experiments' / 'results'
BEGIN = '<!-- results: made by python -m experiments.readme -->\n'
END = '<!-- end of results -->\n'
PROTOCOLS = {
  'resist': 'ResIST',
  'local_sgd': 'local SGD',
  'data_parallel': 'data parallel',
}


def main() -> None:
  """Rewrites the results section of the README."""
  path = ROOT / 'README.md'
  path.write_text(with_results(path.read_text()))


def with_results(text: str) -> str:
  """Returns a README with the results of today's files.

  Args:
    text: The README.

  Returns:
    It, with all between the two markers replaced.
  """
  before, rest = text.split(BEGIN)
  _, after = rest.split(END)
  parts = [
    _digits(),
    *_wire(),
    *_formats(),
    *_memory(),
    *_benches(),
    _peer(),
  ]
  return (
    before + BEGIN + '\n' + '\n'.join(filter(None, parts)) + '\n' + END + after
  )


def _load(pattern: str) -> list[dict[str, Any]]:
  return [
    json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))
  ]


def _table(rows: Sequence[Sequence[str]]) -> str:
  head, *body = ['| ' + ' | '.join(row) + ' |' for row in rows]
  return '\n'.join([head, '|---' * len(rows[0]) + '|', *body]) + '\n'


def _digits() -> str:
  rows = [
    ['', 'test accuracy, deployed', "the paper's protocol", 'sent a round']
    + ['weights on a worker', 'training seconds']
  ]
  provenance = config = None
  for protocol, name in PROTOCOLS.items():
    runs = _load(f'digits/{protocol}_seed*.json')
    if not runs:
      continue
    provenance, config = runs[0]['provenance'], runs[0]['config']
    found = [run['summary'] for run in runs]
    first = found[0]
    rows.append(
      [
        name,
        spread([100 * s['test_accuracy'] for s in found]) + ' %',
        spread([100 * s['test_accuracy_paper'] for s in found]) + ' %',
        f'{first["bytes_per_round"] / 1e6:.2f} MB',
        f'{first["params_per_worker"] / first["params_total"]:.0%}',
        f'{statistics.median(s["seconds_training"] for s in found):.0f}',
      ]
    )
  if provenance is None or config is None:
    return ''
  count = len(_load('digits/resist_seed*.json'))
  seeds = 'one seed'
  if count > 1:
    seeds = f'mean and standard deviation of {count} seeds'
  return (
    f'Handwritten digits (360 test images), {config["num_workers"]} workers, '
    f'{config["num_rounds"]} rounds of {config["local_steps"]} steps, a chain '
    f'of 12 blocks; {seeds}, on '
    f'{_machine(provenance)}. `python -m experiments.digits`\n\n'
    f'{_table(rows)}\n'
    "Sent is the paper's count: every worker fetches its part and brings it "
    'back (data parallel: its gradients, at every step).\n'
  )


def _machine(provenance: dict[str, Any]) -> str:
  device = provenance['device'].split(' x ')[1]
  if device != 'cpu':
    return f'{device}, JAX {provenance["versions"]["jax"]}'
  return (
    f'{provenance["cores"]} cores of {provenance["processor"]}, JAX '
    f'{provenance["versions"]["jax"]}'
  )


def _wire() -> list[str]:
  """What the exchanges of the paper's network send, as compiled."""
  sections = []
  for record in _load('table1/*.json'):
    rows = [['protocol', 'exchange', 'format', 'GB predicted']]
    rows[0] += ['GB in the compiled program', 'of local SGD, exact']
    exact = record['wire']['local_sgd']['all_reduce']['float32']
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
    sections.append(
      "What one round of the paper's ResNet101 puts on the wire, four workers "
      'together, one device each (T = 50 for data parallel); ResIST with the '
      "minimum depth that fits the paper's Table 1, and without one. One round "
      'drawn, not the mean. '
      f'`{record["command"]}`\n\n{_table(rows)}'
    )
  return sections


def _memory() -> list[str]:
  return [
    f'A chain of {r["chain_bytes"] / 2**20:.0f} MiB trained, tested, saved and '
    f'resumed on devices that may hold {r["budget_bytes"] / 2**20:.0f} MiB '
    f'each: no device held more than {r["bound_bytes"] / 2**20:.0f} MiB of '
    'arrays and scratch, data included, of which '
    f'{r["parameter_bytes_per_device"] / 2**20:.0f} MiB are parameters. '
    '`python -m experiments.memory`\n'
    for r in _load('memory/*.json')
  ]


def _formats() -> list[str]:
  return [
    f'Wire formats on {name}. `python -m experiments.wire_formats '
    f'--data={name}`\n\n{_table(rows)}'
    for name in wire_formats.CARDS
    if (rows := wire_formats.table(name))
  ]


def _benches() -> list[str]:
  sections = []
  for record in _load('bench/*_both.json'):
    kinds = record['results'][0]['exchange_share_of_round_at_T_50']
    rows = [
      ['network', "step of a worker's sub-network", 'over a bare jitted step']
      + [kind.replace('_', ' ') for kind in kinds]
      + ['compile', 'images/s, all']
    ]
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
    sections.append(
      f'Speed in {first["dtype"]}, {first["workers"]} workers on '
      f'{first["devices"]} devices, {_machine(record["provenance"])}; the '
      'exchanges are shares of a round of 50 steps. '
      f'`{record["command"]}`\n\n{_table(rows)}'
    )
  return sections


def _peer() -> str:
  return '\n'.join(
    f"One step of the paper's sub-ResNet (11 blocks, batch {r['batch_size']}) "
    f'takes {r["jax_seconds"]:.2f} s, in plain PyTorch '
    f'{r["torch_seconds"]:.2f} s: {r["ratio"]:.2f} times as long, where the '
    f'aim was 1.2. Medians of {r["runs"]} runs in turn, '
    f'{_machine(r["provenance"])}. `{r["command"]}`\n'
    for r in _load('bench/peer_*.json')
  )


if __name__ == '__main__':
  main()
