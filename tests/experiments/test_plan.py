"""Predictions tend to the ratios that they must."""

import itertools
import json
import pathlib
import subprocess
import sys

from absl import flags
from absl.testing import flagsaver
import pytest

from experiments import costs
from experiments import plan as plan_lib
from experiments.compile import known
from experiments.configs import digits
from resist_jax import models
from resist_jax.decomposition import Assigner
from resist_jax.errors import ConfigError
from resist_jax.exchange.hand_over import expected_messages
from resist_jax.run import config as config_lib
from resist_jax.run.command import Options

ROOT = pathlib.Path(__file__).parents[2]
WORKERS = (2, 4, 8, 16, 32, 1024)


def make_plan(image=(32, 32, 3), classes=100, **fields):
  config = config_lib.get_config()
  config.update(fields)
  return plan_lib.Plan(config, image, classes)


@pytest.fixture(scope='module')
def papers():
  return make_plan(min_depth=6)


def machine(bandwidth, flops=1e13, latency=0.0, memory_bandwidth=None):
  return costs.Machine(flops, bandwidth, latency, memory_bandwidth)


@pytest.mark.parametrize('S', WORKERS)
def test_a_fast_link_leaves_the_ratio_of_arithmetic(papers, S):
  flops = [
    models.predicted_flops(papers.network, papers.image, lengths)
    for lengths in ({}, {'stage3_chain': max(-(-22 // S), 6)})
  ]
  speedup = papers.predict(S, machine(1e20))['speedup']
  assert speedup['local_sgd'] == pytest.approx(flops[0] / flops[1])
  assert speedup['data_parallel'] == pytest.approx(flops[0] / flops[1])


def test_distillation_is_one_more_forward_pass(tmp_path):
  flops, parallel = [], []
  for weight in (0.0, 0.5):
    config = config_lib.get_config()
    config.distillation.weight = weight
    plan = costs.Plan(config, (32, 32, 3), 100, records=tmp_path)
    found = plan.predict(4, machine(1e9))
    flops.append(found['resist']['flops'])
    parallel.append(found['data_parallel']['flops'])
  # Three passes, one forward and two backward, become four.
  assert flops[1] / flops[0] == pytest.approx(4 / 3, rel=0.02)
  assert parallel[0] == parallel[1]  # It has nothing to distil.


def test_the_papers_compute_ratios(papers):
  # The paper's 33 blocks cost nearly the same: 1.50 and 1.94.
  for S, ratio in ((2, 1.50), (4, 1.94)):
    speedup = papers.predict(S, machine(1e20))['speedup']['local_sgd']
    assert speedup == pytest.approx(ratio, rel=0.03)


@pytest.mark.parametrize('S', WORKERS)
def test_a_slow_link_leaves_the_ratio_of_bytes(papers, S):
  found = papers.predict(S, machine(1.0))
  sent = {name: found[name]['bytes'] for name in plan_lib.NAMES}
  for name in ('local_sgd', 'data_parallel'):
    ratio = sent[name] / sent['resist']
    assert found['speedup'][name] == pytest.approx(ratio, rel=1e-6)
  # A ring: every worker sends 2 (S - 1) / S of the network, 4 bytes a number.
  ring = 2 * (S - 1) / S * 4 * papers.setup.sizes.total
  assert sent['local_sgd'] == pytest.approx(ring)
  assert sent['data_parallel'] == pytest.approx(50 * ring)
  assert found['resist']['exchange'] == (
    'hand_over' if S <= 22 else 'masked_psum'
  )
  # Where blocks go to their next worker, less than half is sent, or nearly.
  assert sent['resist'] / ring < (0.56 if S <= 22 else 1.001)


def test_seconds_fall_with_bandwidth_and_rise_with_latency(papers):
  def seconds(*args):
    found = papers.predict(4, machine(*args))
    return [found[name]['seconds']['round'] for name in plan_lib.NAMES]

  for slow, fast in itertools.pairwise(plan_lib.LADDER):
    assert all(a > b for a, b in zip(seconds(slow), seconds(fast), strict=True))
  none, some = seconds(1e9), seconds(1e9, 1e13, 1e-3)
  more = [b - a for a, b in zip(none, some, strict=True)]
  # A ring has 6 steps; the chain of 22 goes in 6 columns and one replica's two.
  assert more == pytest.approx([6e-3, 50 * 6e-3, (6 + 6 + 2) * 1e-3])


@pytest.mark.parametrize(
  ('sizes', 'busiest'), [((22, 4, 6), 3), ((22, 4), 0), ((22, 8, 4), 7)]
)
def test_blocks_that_workers_send_are_the_mean_of_many_rounds(sizes, busiest):
  assigns = Assigner(*sizes)
  predicted = costs.blocks_sent(assigns)
  total = expected_messages(assigns, assigns.num_workers)
  assert sum(predicted) == pytest.approx(total)
  assert predicted[busiest] == pytest.approx(max(predicted))
  counted, rounds = [0.0] * assigns.num_workers, 3000
  assignment = assigns.first([0])
  for r in range(1, rounds + 1):
    assignment = assigns.following(assignment.owned, [0], r)
    routes = [
      assigns.column_routes(j)[t] for j, t in enumerate(assignment.shifts)
    ]
    for replica, offset in enumerate(assignment.offsets):
      lend = assigns.replica_routes(replica)[offset]
      routes += [lend, [(target, source) for source, target in lend]]
    for source, target in itertools.chain(*routes):
      counted[source] += (source != target) / rounds
  assert predicted == pytest.approx(counted, abs=0.1)


def write_step(folder, network, memory=(300, 500), blocks=6, **fields):
  """Writes the record of a step, which nobody compiled."""
  sub = network.with_chain_lengths({'stage3_chain': blocks})
  made = {
    'provenance': {'versions': {'jax': '1.0', 'libtpu': '2.0'}},
    'target': 'v5e:2x2',
    'step': known.described(sub, (32, 32, 3), 128),
    'data_bytes': 100,
    'programs': {
      'step': {
        'memory': {'arguments': memory[0], 'temporary': memory[1]},
        'flops': 2e12,
        'hbm_bytes': 7e9,
      }
    },
    **fields,
  }
  (folder / 'a').mkdir(exist_ok=True)
  (folder / 'a' / f'{blocks}.json').write_text(json.dumps(made))


def test_numbers_come_from_a_compiler_where_it_has_been_asked(tmp_path, papers):
  write_step(tmp_path, papers.network)
  write_step(tmp_path, papers.network, blocks=22, programs={'round': {}})
  config = config_lib.get_config()
  config.min_depth = 6

  def plan(chip, records=tmp_path):
    return plan_lib.Plan(config, (32, 32, 3), 100, chip, records)

  v5e = plan('v5e')
  asked = v5e.predict(4, machine(1e9, memory_bandwidth=1e12))
  # The minimum depth gives eight workers the same step, not two.
  eight = v5e.predict(8, machine(1e9))['resist']
  two = v5e.predict(2, machine(1e9))['resist']
  resist, full = asked['resist'], asked['local_sgd']
  assert resist['source'] == eight['source']
  assert resist['source'] == 'compiled for v5e:2x2 by jax 1.0, libtpu 2.0'
  assert two['source'] == full['source'] == costs.FORMULA
  assert resist['flops'] == 50 * 2e12
  assert resist['memory'].keys() == {'step', 'exchange'}
  assert resist['memory']['step'] == 700
  # 100 TFLOP take 10 s at 1e13 a second; 350 GB take 0.35 s.
  assert resist['seconds']['compute'] == pytest.approx(10)
  slow = v5e.predict(4, machine(1e9, memory_bandwidth=1e10))['resist']
  assert slow['seconds']['compute'] == pytest.approx(35)
  # Another chip, and a step of other numbers, is another program.
  assert plan('h100').predict(4, machine(1e9))['resist']['memory'].keys() > {
    'activations'
  }
  config.model.dtype = 'bfloat16'
  assert plan('v5e').predict(4, machine(1e9))['resist']['source'] == (
    costs.FORMULA
  )


def test_the_table_says_who_counted(tmp_path, papers):
  write_step(tmp_path, papers.network)
  config = config_lib.get_config()
  config.min_depth = 6
  plan = plan_lib.Plan(config, (32, 32, 3), 100, 'v5e', tmp_path)
  rows = [plan.predict(S, machine(1e9)) for S in (2, 4, 1024)]
  _, two, four, most = plan_lib._table(rows).splitlines()
  assert two.split()[-2:] == ['formula', 'formula']
  assert four.split()[-2:] == most.split()[-2:] == ['compiler', 'formula']
  (line,) = plan_lib._sources(rows)
  assert line == 'compiler: compiled for v5e:2x2 by jax 1.0, libtpu 2.0'


def test_memory_and_carried_momentum(papers):
  memory = papers.predict(4, machine(1e9))['resist']['memory']
  share = memory['parameters'] / (4 * papers.setup.sizes.total)
  assert share == pytest.approx(0.54, abs=0.005)
  assert memory['optimizer'] == memory['gradients'] == memory['parameters']

  carry = make_plan(min_depth=6, optimizer={'carry_momentum': True})
  once, twice = (p.predict(4, machine(1e9))['resist'] for p in (papers, carry))
  assert twice['bytes'] == pytest.approx(2 * once['bytes'])
  assert twice['messages'] == 2 * once['messages']


def test_messages_of_a_masked_psum_and_of_an_outer_optimiser(papers):
  """Each chain is a ring of its own, and holders agree before an outer step."""
  psum = make_plan(min_depth=6, exchange='masked_psum')
  outer = {'lr': 1.0, 'momentum': 0.5}
  ring = 2 * (4 - 1)

  def messages(plan):
    return plan.predict(4, machine(1e9))['resist']['messages']

  assert messages(psum) == 2 * ring
  stepping = make_plan(min_depth=6, exchange='masked_psum', outer=outer)
  # The shared part; the chain, once to agree, then with its outer momentum.
  assert messages(stepping) == ring + 3 * ring
  assert messages(papers) == ring + 6 + 2
  # Columns move with their momentum; the replica also when holders agree.
  moved = make_plan(min_depth=6, outer=outer)
  assert messages(moved) == ring + 2 * 6 + 3 * 2


def test_too_many_workers_have_a_dash_and_a_reason():
  plan = make_plan(min_depth=0)
  rows = [plan.predict(S, machine(1e9)) for S in (4, 32)]
  first, second, reason = plan_lib._table(rows).splitlines()[1:]
  assert '2.0' in first
  assert ' - ' in second
  assert '32 workers cannot share 22 blocks' in reason
  figure = plan_lib._draw(rows, 1e9)
  labels = [line.get_label() for line in figure.axes[0].lines]
  assert labels[0] == '4 workers, hand over'
  assert not any('32' in label for label in labels)


def run(*args):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.plan', *args],
    cwd=ROOT, capture_output=True, text=True, timeout=1000,
  )  # fmt: skip


GOOD = ('--bandwidth=1Gbit', '--flops=1e13')


def refusal(tmp_path, *args):
  result = run(*args, f'--out={tmp_path / "out"}')
  assert result.returncode == 2, result.stderr
  (line,) = result.stderr.strip().splitlines()
  assert line.startswith('error: ')
  assert not list(tmp_path.iterdir())
  return line


@pytest.mark.experiments
def test_bad_input_is_one_line_and_2_and_writes_nothing(tmp_path):
  line = refusal(tmp_path, '--bandwidth=fast', GOOD[1])
  assert "--bandwidth is 'fast'; write it like 100Mbit" in line
  line = refusal(tmp_path, *GOOD, '--config.min_dept=5')
  assert 'Did you mean min_depth' in line
  line = refusal(tmp_path, *GOOD, '--config.model.module=json')
  assert 'only residual networks of the package can be planned' in line


@pytest.fixture
def papers_config():
  flags.FLAGS.mark_as_parsed()
  config = config_lib.get_config()
  config.data.name = 'cifar100'
  return config


@pytest.mark.parametrize(
  ('given', 'says'),
  [
    ({'bandwidth': '1Gbit/h'}, "--bandwidth is '1Gbit/h'"),
    ({'bandwidth': '0'}, "--bandwidth is '0'"),
    ({'bandwidth': None}, "--bandwidth is ''; write it like 100Mbit"),
    ({'flops': '1e999'}, "--flops is '1e999'"),
    ({'latency': '-1ms'}, "--latency is '-1ms'"),
    ({'memory_bandwidth': '3TB'}, 'write it like 3352GB'),
    # Units of another quantity.
    ({'bandwidth': '1GB'}, "--bandwidth is '1GB'; write it like 100Mbit"),
    ({'memory_bandwidth': '3352Gbit'}, 'write it like 3352GB'),
    ({'latency': '1Gbit'}, "--latency is '1Gbit'"),
    ({'flops': '1e13ms'}, "--flops is '1e13ms'"),
    ({'workers': ['0']}, '--workers must be at least 1'),
    ({'workers': ['two']}, "'two'"),
    ({'image': '32x32'}, 'such as 32x32x3'),
  ],
)
def test_a_bad_value_is_named(papers_config, tmp_path, capsys, given, says):
  values = {'bandwidth': '1Gbit', 'flops': '1e13', 'latency': '1ms', **given}
  options = Options(papers_config, str(tmp_path / 'out'))
  with flagsaver.flagsaver(**values), pytest.raises(SystemExit) as end:
    plan_lib.main([], options)
  assert end.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert says in line
  assert not list(tmp_path.iterdir())


def test_devices_that_share_a_worker_are_not_planned(papers_config):
  papers_config.devices_per_worker = 2
  with pytest.raises(ConfigError, match='devices_per_worker is 2, but a plan'):
    costs.Plan(papers_config, (32, 32, 3), 100)


def test_a_tpu_keeps_fewer_activations(papers_config, tmp_path):
  held = []
  for chip in ('h100', 'v5e'):  # In an empty folder: no compiler was asked.
    plan = costs.Plan(
      papers_config, (32, 32, 3), 100, chip=chip, records=tmp_path
    )
    traffic, _ = plan.traffic('resist', 4)
    held.append(plan.memory(traffic)['activations'])
  assert held[1] < 0.6 * held[0]


def test_units():
  flags.FLAGS.mark_as_parsed()
  for text, value in (('100Mbit', 1e8), ('1.5Gbit', 1.5e9), ('1e9', 1e9)):
    with flagsaver.flagsaver(bandwidth=text):
      assert plan_lib._amount(plan_lib.BANDWIDTH, plan_lib.BITS, '') == value
  with flagsaver.flagsaver(latency='50us'):
    latency = plan_lib._amount(plan_lib.LATENCY, plan_lib.SECONDS, '', 0.0)
  assert latency == pytest.approx(5e-5)


@pytest.mark.experiments
@pytest.mark.parametrize(
  'card', [['--config=experiments/configs/digits.py'], ['--config', 'digits']]
)
def test_a_card_is_planned(card, tmp_path):
  result = run(*GOOD, *card, '--workers=2,4', f'--out={tmp_path}')
  assert result.returncode == 0, result.stderr
  assert 'full-duplex link' in result.stdout
  record = json.loads((tmp_path / 'plan.json').read_text())
  assert len(record['rows']) == 2 * len(plan_lib.LADDER)
  assert record['rows'][0]['resist']['blocks'] == [6]
  assert (tmp_path / 'plan.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.experiments
def test_check_measures_what_it_predicts():
  config = digits.get_config('smoke')
  config.update({'batch_size': 8, 'partition': (2,)})
  config.model.update({'stage_sizes': (1, 3), 'widths': (8, 8)})
  config.phases.full_before, config.wire_format = 1, 'int8'
  rows = plan_lib._check(config, [2])
  assert [row['protocol'] for row in rows] == list(plan_lib.NAMES)
  network = config_lib.build_model(config, 10)
  images = config.local_steps * config.batch_size
  whole, half = (
    images * models.predicted_flops(network, (8, 8, 1), lengths)
    for lengths in ({}, {'stage2_chain': 1})
  )
  assert half < whole
  for row, flops in zip(rows, (whole, whole, half), strict=True):
    assert row['measured'] > 0
    # Local SGD has measured the machine of all three.
    for name in ('flops', 'bandwidth'):
      assert row[name] == rows[0][name] > 0
    assert row['predicted']['compute'] * row['flops'] == pytest.approx(flops)
