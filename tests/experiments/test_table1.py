"""The paper's Table 1, and what goes over the wire."""

import json

import jax
import jax.numpy as jnp
import pytest

from experiments import table1
from resist_jax import accounting, models
from resist_jax.exchange import FORMATS, all_reduce_bytes


@pytest.fixture(scope='module')
def network():
  params = table1.network_shapes()
  return params, accounting.measure(params, [table1.CHAIN])


@pytest.fixture(scope='module')
def found(network):
  # As a program reads it.
  return json.loads(json.dumps(table1.figures(network[1])))


def test_ours_to_the_papers_third_digit(found):
  for protocol, row in found['paper'].items():
    assert set(row) == {'2', '4', '8'}
    for S, printed in row.items():
      ours = found['ours'][protocol][S]
      rounded, cut = round(ours, 3), int(ours * 1000) / 1000
      assert printed in (rounded, cut)
  # It needs both: this one is cut, and this one rounded.
  assert round(found['ours']['resist']['2'], 3) == 0.455
  assert int(found['ours']['local_sgd']['4'] * 1000) == 1324


def test_the_wire_has_every_protocol_exchange_and_format(found):
  forms = {
    (protocol, exchange): tuple(formats)
    for protocol, exchanges in found['wire'].items()
    for exchange, formats in exchanges.items()
  }
  every = tuple(FORMATS)
  assert forms == {
    ('local_sgd', 'all_reduce'): every,
    ('data_parallel', 'all_reduce'): ('float32', 'bfloat16'),
    ('resist', 'masked_psum'): every,
    ('resist', 'hand_over'): every,
    ('resist_without_min_depth', 'masked_psum'): every,
    ('resist_without_min_depth', 'hand_over'): every,
  }


@pytest.mark.parametrize('S', [2, 4, 8])
def test_a_ring_sends_a_share_of_the_papers_count(found, S):
  # Workers keep a part of the sum: (S - 1) / S of what the paper counts.
  sent = found['wire']['local_sgd']['all_reduce']['float32'][str(S)]
  counted = found['ours']['local_sgd'][str(S)]
  assert sent == pytest.approx((S - 1) / S * counted)
  gradients = found['wire']['data_parallel']['all_reduce']['float32'][str(S)]
  assert gradients == pytest.approx(table1.STEPS * sent)


def share(found, protocol, exchange, form, S):
  whole = found['wire']['local_sgd']['all_reduce']['float32'][S]
  return found['wire'][protocol][exchange][form][S] / whole


def test_shares_of_local_sgd_on_four_workers(found):
  bare = 'resist_without_min_depth'
  assert 0.44 < share(found, bare, 'hand_over', 'float32', '4') <= 0.46
  assert 0.12 < share(found, bare, 'hand_over', 'int8', '4') <= 0.15
  assert share(found, 'resist', 'hand_over', 'int8', '4') <= 0.15
  # A masked psum sends the whole network, whatever the depth.
  for protocol in (bare, 'resist'):
    whole = share(found, protocol, 'masked_psum', 'float32', '4')
    assert whole == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize('S', [2, 4, 8])
def test_a_hand_over_sends_blocks_that_change_workers_and_no_more(network, S):
  _, sizes = network
  variant = table1.Variant('resist_without_min_depth', 'hand_over', 'float32')
  protocol = table1._protocol(variant, S, 22)
  shared = all_reduce_bytes(sizes.shared, S, S)
  moved, before = set(), protocol.assign(1, 0)
  for r in range(1, 21):
    after = protocol.assign(1, r, before)
    pair = before[table1.CHAIN], after[table1.CHAIN]
    sent = accounting.wire_bytes(sizes, protocol, S, {table1.CHAIN: pair})
    sent, before = sent - shared, after
    changed = table1._changes(*pair, 22)
    assert sent == changed * 4 * sizes.block[table1.CHAIN]
    moved.add(changed)
  assert len(moved) > 3


@pytest.mark.experiments
def test_programs_send_what_is_predicted():
  # A small network: what is sent is told by shapes alone.
  net = models.PreActResNetTiny(num_classes=10)
  params = jax.eval_shape(
    lambda: net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  )['params']
  sizes = accounting.measure(params, [table1.CHAIN])
  variants = [
    table1.Variant('local_sgd', 'all_reduce', 'int8'),
    table1.Variant('data_parallel', 'all_reduce', 'bfloat16'),
    table1.Variant('resist', 'masked_psum', 'int8'),
    table1.Variant('resist', 'hand_over', 'float32'),
    table1.Variant('resist_without_min_depth', 'hand_over', 'float32'),
  ]
  option = 'jax_compilation_cache_include_metadata_in_key'
  before = getattr(jax.config, option)
  rows = list(table1.compiled_rows(params, sizes, [4], variants))
  jax.config.update(option, before)
  assert [row['protocol'] for row in rows] == [v.protocol for v in variants]
  for row in rows:
    assert row['read'] == row['predicted'] > 0
  assert rows[3]['blocks_sent'] > rows[3]['blocks_that_change_workers']
  assert rows[4]['blocks_sent'] == rows[4]['blocks_that_change_workers']


def test_main_prints_for_people_and_machines(monkeypatch, capsys, tmp_path):
  # Other tests have made their devices already.
  monkeypatch.setattr(table1.jax.config, 'update', lambda *_: None)

  def run(*flags):
    monkeypatch.setattr('sys.argv', ['table1', *flags])
    with pytest.raises(SystemExit) as end:
      table1.main()
    return end.value.code, capsys.readouterr().out

  code, printed = run('--json', f'--out={tmp_path / "a" / "b.json"}')
  result = json.loads(printed)
  assert not code
  assert set(result) == {'paper', 'ours', 'wire'}
  written = json.loads((tmp_path / 'a' / 'b.json').read_text())
  assert written['ours'] == result['ours']
  assert {'command', 'provenance'} < set(written)

  row = {**table1.BASELINE._asdict(), 'workers': 2, 'predicted': 8.0}
  for read, code, verdict in ((8, 0, 'All are equal'), (9, 1, '1 of 1 differ')):
    rows = [{**row, 'read': read}]
    monkeypatch.setattr(table1, 'compiled_rows', lambda *_, r=rows: r)
    found, printed = run('--compiled')
    assert found == code
    assert verdict in printed
  assert '0.454  0.45455' in printed
