"""Unchanged settings give unchanged parameters, to the bit."""

from covering import rest_is_slow
import golden
import pytest

QUICK = ('unequal',)


@pytest.mark.parametrize('name', rest_is_slow(golden.RUNS, QUICK))
def test_a_run_gives_the_stored_parameters(name, tmp_path):
  """Compares digests where one is stored for this machine, and norms always.

  On other machines, norms of all leaves differ by rounding alone.
  """
  stored = golden.read()
  digest, norms = golden.train_run(name, tmp_path)
  digests = stored['digests'].get(golden.signature())
  if digests:
    assert digest == digests[name]
  want = stored['norms'][name]
  assert norms == pytest.approx(want, rel=1e-4)


def test_digests_are_stored_for_all_runs():
  stored = golden.read()
  assert stored['norms'].keys() == golden.RUNS.keys()
  assert stored['digests']
  for digests in stored['digests'].values():
    assert digests.keys() == golden.RUNS.keys()
