"""A network is the same however it is cut, stopped, or named on a command line.

This holds for the language model and for the vision transformer.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import language, protocols, protocols_report, runs, text
from experiments import vision_transformer as vit
from experiments.transformer import BLOCKS
from resist_jax import data


@pytest.fixture(autouse=True)
def _promotion():
  """Adam in optax mixes dtypes; the package does not."""
  with jax.numpy_dtype_promotion('standard'):
    yield


def language_task():
  return language.task('python', 'smoke', text.load(text.SOURCES))


def image_task():
  return vit.task(data.load('digits'), 'smoke')


def drawn(task):
  """Parameters, with a classifier that does not begin with zeros."""
  params = jax.jit(task.init)(0)
  if 'classifier' in params:
    shape = params['classifier'].shape
    params['classifier'] = jax.random.normal(jax.random.key(1), shape)
  return params


TASKS = pytest.mark.parametrize(
  'make',
  [pytest.param(language_task, marks=pytest.mark.experiments), image_task],
)


@pytest.mark.experiments
@TASKS
def test_a_block_that_is_absent_changes_nothing_and_has_no_gradient(make):
  task = make()
  params = drawn(task)
  loss_fn = task.make_loss(1.0)
  batch = jax.tree.map(lambda x: x[0, 0], task.batches(1, 0, 0))
  present = {BLOCKS: jnp.ones(8).at[1].set(0)}
  grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
  (loss, _), grads = grad(params, present, batch, None)
  kept = np.array([0, 2, 3, 4, 5, 6, 7])
  fewer = {**params, BLOCKS: jax.tree.map(lambda x: x[kept], params[BLOCKS])}
  want, _ = jax.jit(loss_fn)(fewer, {BLOCKS: jnp.ones(7)}, batch, None)
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  for leaf in jax.tree.leaves(grads[BLOCKS]):
    assert not leaf[1].any()
  assert grads[BLOCKS]['Dense_1']['kernel'][0].any()


@pytest.mark.experiments
@TASKS
def test_a_scale_in_training_is_the_same_scale_in_a_test(make):
  task = make()
  params = drawn(task)
  batch = jax.tree.map(lambda x: x[0, 0], task.batches(1, 0, 0))
  losses = [
    float(jax.jit(task.make_loss(scale))(params, {}, batch, None)[0])
    for scale in (0.0, 0.5, 1.0)
  ]
  assert len(set(losses)) == 3
  halves = {BLOCKS: jnp.full(8, 0.5)}
  scaled, _ = jax.jit(task.make_loss(1.0))(params, halves, batch, None)
  assert float(scaled) == pytest.approx(losses[1], rel=1e-6)
  tested = [task.test(params, scale)['test_loss'] for scale in (0.0, 0.5, 1.0)]
  assert len(set(tested)) == 3


def test_protocols_differ_in_what_they_cut_scale_and_send():
  task = image_task()
  made = {p: protocols.make_trainer(task, p, 4, 0) for p in protocols.PROTOCOLS}
  scales = {name: scale for name, (_, scale) in made.items()}
  assert scales.pop('resist') == scales.pop('resist_outer') == 1 / 4
  assert set(scales.values()) == {1.0}
  params = jax.jit(task.init)(0)
  sent = {
    name: trainer.bytes_per_round(trainer.init(params))
    for name, (trainer, _) in made.items()
  }
  assert sent['resist'] == sent['resist_training_scale'] < sent['resist_outer']
  assert sent['resist_outer'] < sent['local_sgd'] == sent['diloco']
  steps = task.budget.local_steps
  assert sent['data_parallel'] > 0.9 * steps * sent['local_sgd']


@pytest.mark.parametrize(
  ('make', 'protocol'),
  [
    pytest.param(language_task, 'resist_outer', marks=pytest.mark.experiments),
    pytest.param(image_task, 'data_parallel', marks=pytest.mark.experiments),
  ],
)
def test_a_run_that_stops_goes_on_to_the_same_end(
  make, protocol, tmp_path, monkeypatch
):
  task = make()
  for name in ('whole', 'stopped'):
    (tmp_path / name).mkdir()
  want = protocols.run(task, protocol, 2, 0, tmp_path / 'whole')['curve']
  save, saved = protocols.resist.Trainer.save, []

  def fail_later(*args):
    saved.append(args)
    if len(saved) == 3:  # The row of round 2 is written, its state is not.
      raise RuntimeError('stopped')
    save(*args)

  monkeypatch.setattr(protocols.resist.Trainer, 'save', fail_later)
  with pytest.raises(RuntimeError, match='stopped'):
    protocols.run(task, protocol, 2, 0, tmp_path / 'stopped')
  monkeypatch.setattr(protocols.resist.Trainer, 'save', save)
  got = protocols.run(task, protocol, 2, 0, tmp_path / 'stopped')['curve']
  for one, other in zip(got, want, strict=True):
    del one['seconds'], other['seconds']
    assert one == other
  assert got[-1]['bytes'] > 0


def command(monkeypatch, module, *words):
  monkeypatch.setattr(sys, 'argv', ['x', '--scale=smoke', *words])
  return module.main()


@pytest.mark.experiments
def test_a_command_writes_what_the_report_shows(tmp_path, monkeypatch):
  words = [f'--results={tmp_path}', f'--runs={tmp_path}/runs', '--seeds=2']
  words += ['--only=resist_s2', '--busy']
  assert command(monkeypatch, vit, *words) == 0
  folder = tmp_path / 'vision_transformer'
  paths = sorted((folder / 'smoke').glob('*.json'))
  assert [path.stem for path in paths] == [
    f'digits_resist_s2_seed{seed}' for seed in (0, 1)
  ]
  record = json.loads(paths[0].read_text())
  assert record['provenance']['busy']
  assert [row['round'] for row in record['curve']] == [1, 2, 3]
  before = paths[0].stat().st_mtime_ns
  assert command(monkeypatch, vit, *words) == 0
  assert paths[0].stat().st_mtime_ns == before
  other = {**record, 'config': {**record['config'], 'data': 'cifar10'}}
  paths[0].write_text(json.dumps(other))
  assert command(monkeypatch, vit, *words) == 2  # A result of another text.
  paths[0].write_text(json.dumps(record))
  assert not list((tmp_path / 'runs').rglob('*.json'))

  (folder / 'smoke').rename(folder / 'cpu')
  (table,) = protocols_report.tables('vision_transformer', tmp_path)
  ((S, name, loss, *_),) = table.rows
  tested = [
    json.loads(p.read_text())['summary']['test_loss']
    for p in (folder / 'cpu').glob('*.json')
  ]
  assert (S, name) == ('2', 'ResIST')
  assert loss.startswith(f'{np.mean(tested):.3f} ± ')
  (figure,) = protocols_report.figures('vision_transformer', tmp_path).values()
  drawn = figure.axes[0].lines[0].get_xydata()
  np.testing.assert_allclose(drawn[-1], [6, np.mean(tested)])


def test_runs_on_accelerators_have_no_predicted_seconds(tmp_path):
  budget = {'rounds': 2, 'local_steps': 3, 'batch': 4}
  shape = {'length': 5, 'layers': 6, 'width': 7}
  record = {
    'provenance': {'device': '1 x H100', 'versions': {'jax': '1'}},
    'config': {'protocol': 'resist', 'num_workers': 2, 'data': 'tfds:a/b',
               'text_bytes': 9, 'shape': shape, **budget},
    'summary': {'seed': 0, 'params_total': 10, 'params_in_blocks': 5,
                'params_per_worker': 8, 'flops_per_step': None,
                'bytes_per_round': 100, 'test_loss': 1.0},
    'curve': [{'round': r, 'steps': 3 * r, 'bytes': 100 * r, 'test_loss': 1 / r}
              for r in (1, 2)],
  }  # fmt: skip
  runs.write_record(tmp_path / 'language/cpu/b_resist_s2_seed0.json', record)
  (table,) = protocols_report.tables('language', tmp_path)
  ((*_, flops, _, seconds),) = table.rows
  assert (flops, seconds) == ('', '')
  assert 'windows of 5 bytes' in table.caption
  ((name, figure),) = protocols_report.figures('language', tmp_path).items()
  assert name == 'loss_b'
  steps, sent, predicted = figure.axes
  assert len(steps.lines) == len(sent.lines) == 1
  assert not predicted.lines


def test_a_mean_is_not_taken_over_two_texts(tmp_path, monkeypatch, capsys):
  """As of another version of Python, whose sources are longer."""
  folder = tmp_path / 'language' / 'smoke'
  config = {'data': 'python', 'text_bytes': 9, 'seed': 5}
  runs.write_record(folder / 'python_resist_s2_seed5.json', {'config': config})
  words = '--scale=smoke', '--only=resist_s2', f'--results={tmp_path}'
  assert command(monkeypatch, language, *words) == 2
  assert 'is of a run with text_bytes 9, and' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('module', 'words', 'wanted'),
  [
    (language, ['--only=resist_s3'], "--only names 'resist_s3': take some of"),
    (language, ['--seeds=0'], '--seeds is 0; it must be at least 1'),
    (language, ['--text=none.txt'], 'the text none.txt cannot be read'),
    (vit, ['--data=no_such_set'], 'no_such_set'),
  ],
)
def test_a_mistake_is_one_line(
  module, words, wanted, tmp_path, monkeypatch, capsys
):
  words = [*words, f'--results={tmp_path}', f'--data_dir={tmp_path}']
  assert command(monkeypatch, module, *words) == 2
  said = capsys.readouterr().err.splitlines()
  assert len(said) == 1
  assert said[0].startswith('error: ')
  assert wanted in said[0]
