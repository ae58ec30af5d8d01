"""The page of all results, and the rule by which it judges claims."""

from pages import check_alone
import pytest
from test_tables import put, record

from experiments import claims, pictures, sections, site, table2
from experiments.claims import Claim
from experiments.experiment import Results
from experiments.table import Table

FEW, MANY = [50.0], [50.0, 50.1, 50.2]


def up(points):
  return [value + points for value in MANY]


@pytest.mark.parametrize(
  ('pairs', 'verdict'),
  [
    ({'a': ([], MANY)}, 'untested'),
    ({'a': ([], [])}, 'untested'),
    ({'a': (up(3), FEW)}, 'undecided'),
    ({'a': (up(3), MANY)}, 'holds'),
    ({'a': (up(3), MANY), 'b': (MANY, [])}, 'holds'),
    ({'a': (up(3), MANY), 'b': (up(3), FEW)}, 'holds in part'),
    ({'a': (up(3), MANY), 'b': (up(0.5), MANY)}, 'does not hold'),
    ({'a': (up(-3), MANY), 'b': (up(3), FEW)}, 'does not hold'),
  ],
)
def test_the_verdict_follows_from_the_settings(pairs, verdict):
  claim = claims.accuracy('Ours is better.', pairs, claims.BETTER, 'cpu')
  assert claim.verdict == verdict


def test_level_accuracies_speak_for_a_claim_of_no_loss():
  for points, verdict in (
    (0.5, 'holds'),
    (-0.5, 'holds'),
    (-3, 'does not hold'),
  ):
    pairs = {'a': (up(points), MANY)}
    claim = claims.accuracy('No loss.', pairs, claims.AS_GOOD, 'cpu')
    assert claim.verdict == verdict
  assert claim.found == 'a: 47.1 against 50.1 (with 3 seeds or more).'


def test_an_undecided_setting_says_where_it_leans():
  pairs = {'a': ([60.0], FEW), 'b': ([40.0], FEW), 'c': (FEW, FEW)}
  claim = claims.accuracy('Better.', pairs, claims.BETTER, 'cpu')
  assert claim.found == (
    'a: 60.0 against 50.0 (one seed ranks nothing, but leans towards it); '
    'b: 40.0 against 50.0 (one seed ranks nothing, but leans against it); '
    'c: 50.0 against 50.0 (one seed ranks nothing).'
  )


@pytest.mark.parametrize(
  ('numbers', 'verdict'),
  [
    ((None, 1.0), 'untested'),
    ((1.0, 2.0), 'holds'),
    ((1.0, 1.05), 'undecided'),
    ((1.05, 1.0), 'undecided'),
    ((2.0, 1.0), 'does not hold'),
  ],
)
def test_seconds_that_differ_little_rank_nothing(numbers, verdict):
  claim = claims.smaller('Faster.', {'a': numbers}, 's', 'cpu', 0.1)
  assert claim.verdict == verdict


def test_claims_come_from_result_files(tmp_path):
  results = Results('table2', 'cpu', tmp_path)
  judge = claims.OF_EXPERIMENT['table2']
  assert {c.verdict for c in judge(results)} == {'untested'}
  for seed in range(3):
    for protocol, accuracy in (('resist', 0.5), ('local_sgd', 0.502)):
      cell = table2.cell('cifar10', protocol, 4)
      put(results, cell, record(accuracy + 0.001 * seed, seed))
  first, *others = judge(results)
  assert first.verdict == 'holds'
  assert 'CIFAR-10, 4 workers: 50.1 against 50.3' in first.found
  assert '5 more without results' in first.found
  assert {c.verdict for c in others} == {'untested'}
  for seed in range(3):
    cell = table2.cell('cifar10', 'resist', 8)
    put(results, cell, record(0.3 + 0.001 * seed, seed))
    cell = table2.cell('cifar10', 'resist', 2)
    put(results, cell, record(0.6 + 0.001 * seed, seed))
  assert judge(results)[1].verdict == 'does not hold'


def test_every_claim_is_judged_at_each_scale():
  found = list(claims.every())
  assert {claim.verdict for claim in found} <= set(claims.VERDICTS)
  judged = {(claim.text, claim.scale) for claim in found}
  assert len(judged) == len(found)
  for section in sections.sections():  # The page counts what it shows.
    assert {(c.text, c.scale) for c in section.claims} <= judged
  texts = ' '.join(claim.text for claim in found)
  assert 'With 8 workers, "+ minimum depth" helps' in texts
  assert 'data parallel training is better than ResIST at four workers' in texts


def test_the_page_holds_every_table(tmp_path):
  table = Table('A < B', 'python -m x', ['a'], [['<1>'], ['2 ± 1']])
  drawn = pictures.steps({'t': {'ours': {'a': [1.0], 'b': [2.0]}}})
  claim = Claim('1 < 2.', claims.FAILS, 'a & b.', 'cpu')
  part = sections.Section('This & that', [table], {'c': drawn}, (), [claim])
  path = tmp_path / 'index.html'
  path.write_text(site.page([part], [claim]))
  tags = check_alone(path)
  text = path.read_text()
  assert '<h2>This &amp; that</h2>' in text
  assert '<td data-head="a">&lt;1&gt;</td>' in text
  assert '<code>python -m x</code>' in text
  assert text.count('<svg class="chart"') == 1
  assert '<b>does not hold</b>1 &lt; 2.' in text
  assert '1 claims are judged below: 1 do not hold.' in text
  assert tags.loads == []


@pytest.mark.experiments
def test_the_page_of_the_committed_results_needs_no_network(tmp_path):
  parts = list(sections.sections(with_figures=True))
  path = tmp_path / 'index.html'
  path.write_text(site.page(parts, list(claims.every())))
  tags = check_alone(path)
  assert tags.tags.count('section') == len(parts) > 10
  assert path.read_text().count('<svg class="chart"') > 10
