"""The programs of a round hold, send and build no more than they should."""

import itertools
import math
import re

from covering import rest_is_slow
import jax
import pytest
from test_rounds import L, hand_over, problem, resist
import tiny

from resist_jax import make_mesh
from resist_jax.exchange import FORMATS
from resist_jax.rounds import compiled, mesh


def programs(protocol, D=4, on_device=False, ahead=True):
  loss_fn, params = problem()
  mesh, run = tiny.make_round(loss_fn, protocol, D, on_device)
  assigned = tiny.assignments(protocol)
  state = tiny.distribute(params, protocol, mesh, next(assigned))
  if ahead:
    batches = tiny.batches(0, protocol.num_workers, protocol.local_steps)
    run = run.compile(state, tiny.examples(), batches)
  return state, run, assigned


COLLECTIVE = (
  r'all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter'
)


@pytest.mark.parametrize(
  'wire_format', rest_is_slow(list(FORMATS), ['float32'])
)
def test_local_training_has_no_collective_and_never_the_chain(wire_format):
  _, run, _ = programs(resist(4, wire_format=wire_format))
  text = run.programs['step'].as_text()
  assert not re.search(COLLECTIVE, text)
  # A block's kernel is [3, 3, 8, 8]. K = 2 of them are stacked, never L = 5.
  assert 'f32[2,3,3,8,8]' in text
  assert 'f32[5,3,3,8,8]' not in text
  finish = run.programs['finish'].as_text()
  assert re.search(COLLECTIVE, finish)
  assert 'f32[5,3,3,8,8]' in finish  # The masked psum does build it.


@pytest.mark.parametrize('min_depth', rest_is_slow([0, 3], [3]))
def test_a_hand_over_builds_nothing_larger_than_a_sub_network(min_depth):
  protocol = hand_over(4, min_depth=min_depth)
  state, run, _ = programs(protocol)
  finish = run.programs['finish'].as_text()
  assert re.search('collective-permute', finish)
  shapes = re.findall(r'\bf32\[([\d,]+)\]', finish)
  sizes = {math.prod(map(int, shape.split(','))) for shape in shapes}
  kernel = 3 * 3 * 8 * 8
  message = 2 * (kernel + 2 * 8)  # One block: two kernels and two norms.
  K = protocol.slots_per_worker(tiny.CHAIN)
  # The shared part, which every sub-network has, is summed in one message.
  shared = sum(x[0].size for x in jax.tree.leaves(state.shared))
  assert shared in sizes
  assert max(sizes - {shared}) == max(K * kernel, message) < L * kernel


PROTOCOLS = [
  resist(4),
  hand_over(4),
  hand_over(4, min_depth=3),
  hand_over(4, wire_format='int8'),
  hand_over(4, min_depth=3, exclude_faulty=True),
]
FORMS = pytest.mark.parametrize(
  ('protocol', 'on_device'),
  rest_is_slow(
    list(itertools.product(PROTOCOLS, [False, True])),
    [(PROTOCOLS[3], True), (PROTOCOLS[4], False)],
  ),
)


@FORMS
def test_one_compilation_serves_all_decompositions(protocol, on_device):
  state, run, assigned = programs(protocol, on_device=on_device, ahead=False)
  for r in range(3):
    batches = tiny.batches(r, 4, 2)
    state, _ = run(state, tiny.examples(), batches, next(assigned))
  sizes = {name: p._cache_size() for name, p in run.programs.items()}
  assert set(sizes.values()) == {1}, sizes


@FORMS
def test_the_state_is_donated(protocol, on_device):
  state, run, assigned = programs(protocol, on_device=on_device)
  run(state, tiny.examples(), tiny.batches(0, 4, 2), next(assigned))
  kernel = state.chain[tiny.CHAIN]['conv1']['kernel']
  assert kernel.is_deleted()
  assert state.shared['stem']['kernel'].is_deleted()


def test_a_hand_over_refuses_slots_that_it_cannot_reach():
  state, run, assigned = programs(hand_over(4), ahead=False)
  fresh = {tiny.CHAIN: tiny.assign(1, L, 4)}
  next(assigned)
  for wrong in (fresh, next(assigned)):  # Somebody's, and of a later round.
    with pytest.raises(ValueError, match='cannot reach these') as raised:
      run(state, tiny.examples(), tiny.batches(0, 4, 2), wrong)
    assert '\n' not in str(raised.value)
  assert not state.shared['stem']['kernel'].is_deleted()


def test_a_step_is_compiled_with_the_options_of_its_mesh(monkeypatch):
  monkeypatch.setattr(
    compiled, 'compiler_options', lambda mesh: {'xla_no_such_option': ''}
  )
  with pytest.raises(jax.errors.JaxRuntimeError, match='xla_no_such_option'):
    programs(resist(4))


def test_convolutions_on_a_cpu_are_kept_from_the_slow_library(monkeypatch):
  """Only where XLA has the option, and nobody has chosen another value."""
  here = make_mesh(1)
  assert mesh.compiler_options(here).keys() == {mesh._LIBRARY}
  monkeypatch.setenv('XLA_FLAGS', f'--{mesh._LIBRARY}=')
  assert mesh.compiler_options(here) == {}
  monkeypatch.delenv('XLA_FLAGS')
  monkeypatch.setattr(mesh, '_ON_CPU', {'xla_no_such_option': ''})
  monkeypatch.setattr(mesh, '_has_library', mesh._has_library.__wrapped__)
  assert mesh.compiler_options(here) == {}


def test_a_round_that_may_hang_is_warned_of(monkeypatch, tmp_path):
  monkeypatch.setattr(mesh, '_LOADS_MAY_HANG_FROM', (0, 0))
  name = 'jax_compilation_cache_dir'
  before = getattr(jax.config, name)
  try:
    jax.config.update(name, None)
    assert not mesh.loads_may_hang(make_mesh(2))
    jax.config.update(name, str(tmp_path))
    assert not mesh.loads_may_hang(make_mesh(1))
    with pytest.warns(RuntimeWarning, match='jax_enable_compilation_cache'):
      tiny.make_round(problem()[0], resist(4), 4, False)
  finally:
    jax.config.update(name, before)
