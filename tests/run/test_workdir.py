"""Who may use a workdir, and what a run does when somebody takes it away."""

import json
import shutil
import threading

import pytest
from test_train import least_config, rows

from resist_jax.errors import ConfigError, WorkdirLostError
from resist_jax.rounds import storage
from resist_jax.run import metrics, train, workdir
from resist_jax.run.config import TRAINED_BY, get_config


def row(number):
  return {
    'round': number,
    'train_loss': 1.0,
    'train_accuracy': 0.5,
    'wire_bytes_total': 1,
    'images_per_second': 1.0,
    'slots': {'chain': [[0], [1]]},
  }


def test_fields_younger_than_a_run_had_what_is_now_their_default(tmp_path):
  """Groups of such fields, too."""
  before = get_config().to_dict()
  for name in ('average', 'outer', 'shared_every'):
    del before[name]
  workdir.write_json(tmp_path / 'config.json', before)
  config = get_config()
  workdir.check(tmp_path, config.to_dict())
  config.outer.lr = 1.0
  with pytest.raises(ConfigError, match=r'outer.lr None -> 1.0\)'):
    workdir.check(tmp_path, config.to_dict())


def test_the_file_of_a_schedule_may_lie_elsewhere(tmp_path):
  config = get_config().to_dict()

  def check(schedule):
    config['optimizer']['schedule'] = schedule
    workdir.check(tmp_path, config)

  config['optimizer']['schedule'] = 'card.py:rate'
  workdir.write_json(tmp_path / 'config.json', config)
  check('/home/me/card.py:rate')
  for other in ('other.py:rate', 'card.py:another', 'cosine'):
    with pytest.raises(ConfigError, match=r'another config .*schedule'):
      check(other)


def move(folder):
  folder.rename(folder.with_name('moved'))


def replace_by_a_copy(folder):
  move(folder)
  shutil.copytree(folder.with_name('moved'), folder)


def edit_log(folder):
  """As editors save: a new file takes the name."""
  workdir.replace_text(folder / 'metrics.jsonl', '')


def lose_config(folder):
  (folder / 'config.json').unlink()


@pytest.mark.parametrize(
  'lose', [shutil.rmtree, move, replace_by_a_copy, edit_log, lose_config]
)
def test_a_log_notices_that_its_workdir_is_lost(lose, tmp_path):
  folder = tmp_path / 'run'
  folder.mkdir()
  workdir.write_json(folder / 'config.json', {})
  with metrics.MetricsLog(folder, 0, 10) as log:
    log.write(row(1))
    log.write(row(2))
    lose(folder)
    with pytest.raises(WorkdirLostError, match='kept since round 2') as caught:
      log.write(row(3))
    assert '\n' not in str(caught.value)
    assert 'deleted, moved or replaced' in str(caught.value)
    with pytest.raises(WorkdirLostError):
      log.check()


def test_a_run_whose_workdir_is_moved_while_it_saves_says_so(
  tmp_path, monkeypatch
):
  folder, write = tmp_path / 'run', storage.begin

  def move_and_write(path, state, record, *args):
    if record['round'] == 2:
      move(folder)
    return write(path, state, record, *args)

  monkeypatch.setattr(storage, 'begin', move_and_write)
  with pytest.raises(WorkdirLostError, match='since round 2'):
    train.train(least_config(checkpoint_every=2, eval_every=4), folder)
  assert [row['round'] for row in rows(tmp_path / 'moved')] == [1, 2]


def check(folder):
  workdir.check(folder, {'lr': 0.1})


@pytest.mark.parametrize(
  'content', [b'[]', b'3', b'null', b'{"lr": 0.', b'', b'\xff\0', b'[' * 10**5]
)
def test_a_config_that_is_none_is_refused_in_one_line(content, tmp_path):
  (tmp_path / 'config.json').write_bytes(content)
  with pytest.raises(ConfigError, match='is not the config of a run') as caught:
    check(tmp_path)
  assert '\n' not in str(caught.value)
  assert 'repair it, or choose another workdir' in str(caught.value)


def test_a_config_that_is_a_folder_is_refused(tmp_path):
  (tmp_path / 'config.json').mkdir()
  with pytest.raises(ConfigError, match='is not the config of a run'):
    check(tmp_path)


def test_checkpoints_are_numbered_folders_that_orbax_has_finished(tmp_path):
  def make(name):
    (tmp_path / 'checkpoints' / name).mkdir(parents=True)
    return tmp_path / 'checkpoints' / name / '_CHECKPOINT_METADATA'

  for name in ('2', '10', '2_best', '1.bak', '007', '３'):  # noqa: RUF001
    make(name).touch()
  make('2024')
  (tmp_path / 'checkpoints' / '5').symlink_to(tmp_path / 'checkpoints' / '2')
  (tmp_path / 'checkpoints' / '6').write_text('a note')
  assert workdir.saved_rounds(tmp_path / 'checkpoints') == [2, 10]
  assert workdir.saved_rounds(tmp_path / 'none') == []


@pytest.mark.parametrize('name', ['model', 'data.json', 'summary.json'])
def test_what_no_run_has_written_is_not_replaced(name, tmp_path):
  (tmp_path / name).mkdir()
  with pytest.raises(ConfigError, match=rf'holds {name} but no config\.json'):
    check(tmp_path)
  (tmp_path / 'config.json').write_text('{"lr": 0.1}')
  check(tmp_path)


@pytest.mark.parametrize('name', ['lr=[0.1,0.2]', 'a*'])
def test_a_path_that_orbax_would_misread_is_refused(name, tmp_path):
  with pytest.raises(ConfigError, match=r'orbax.* as patterns: choose another'):
    check(tmp_path / name / 'run')
  check(tmp_path / 'a[b')


def test_what_is_no_checkpoint_does_not_need_a_config(tmp_path):
  folder = tmp_path / 'checkpoints' / '7'
  folder.mkdir(parents=True)
  check(tmp_path)
  (folder / '_CHECKPOINT_METADATA').touch()
  with pytest.raises(ConfigError, match=r'checkpoints but no config\.json'):
    check(tmp_path)


@pytest.mark.parametrize('left', [[], [1], [1, 3], [1, 1, 2]])
def test_a_log_that_lost_rows_says_so(left, tmp_path, caplog):
  rows = [json.dumps({'round': n, 'slots': {}}) + '\n' for n in left]
  (tmp_path / 'metrics.jsonl').write_text(''.join(rows))
  with metrics.MetricsLog(tmp_path, 3, 5):
    pass
  (said,) = caplog.messages
  assert f'has no row of {3 - len({*left})} of the 3 rounds' in said
  assert 'metrics.jsonl' in said


def test_a_whole_log_says_nothing(tmp_path, caplog):
  rows = [json.dumps({'round': n, 'slots': {}}) + '\n' for n in (1, 2, 3, 4)]
  (tmp_path / 'metrics.jsonl').write_text(''.join(rows))
  with metrics.MetricsLog(tmp_path, 3, 5):
    pass
  assert not caplog.messages


@pytest.mark.parametrize(('start', 'kept'), [(0, []), (2, [0, 1, 2])])
def test_round_0_is_no_round_that_is_done(start, kept, tmp_path, caplog):
  path = tmp_path / 'metrics.jsonl'
  rows = [json.dumps({'round': n, 'slots': {}}) + '\n' for n in (0, 1, 2, 3)]
  path.write_text(''.join(rows))
  with metrics.MetricsLog(tmp_path, start, 5):
    pass
  found = [json.loads(line)['round'] for line in path.read_text().splitlines()]
  assert found == kept
  assert not caplog.messages
  path.write_text(''.join(rows[:2]))  # One of the two rounds is lost.
  with metrics.MetricsLog(tmp_path, 2, 5):
    pass
  assert 'has no row of 1 of the 2 rounds' in caplog.text


def test_a_mark_tells_folders_apart(tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  one.mkdir()
  two.mkdir()
  token = workdir.mark(one)
  assert workdir.marked(one) == token
  assert workdir.marked(two) is None
  assert workdir.marked(tmp_path / 'none') is None
  assert workdir.mark(two) != token
  assert workdir.mark(one) != token
  assert not list(tmp_path.rglob('*.part'))


def test_a_mark_that_is_seen_late_is_waited_for(tmp_path):
  """As on NFS, which remembers for a while that a new folder is not there."""
  (tmp_path / 'soon').mkdir()
  token = workdir.mark(tmp_path / 'soon')
  late = threading.Timer(1, (tmp_path / 'late').symlink_to, ('soon',))
  late.start()
  assert workdir.await_mark(tmp_path / 'late', token) == token
  late.join()
  other = workdir.await_mark(tmp_path / 'late', 'of another', patience=0.1)
  assert other == token
  assert workdir.await_mark(tmp_path / 'none', token, patience=0.1) is None


def test_a_run_from_before_a_field_goes_on_with_its_default(tmp_path):
  config = get_config()
  saved = config.to_dict()
  del saved['data']['test_split'], saved['optimizer']['momentum']
  (tmp_path / 'config.json').write_text(json.dumps(saved))
  workdir.check(tmp_path, config.to_dict())
  config.data.test_split = 'validation'
  with pytest.raises(ConfigError, match=r'data.test_split None -> .valid'):
    workdir.check(tmp_path, config.to_dict())


def test_an_ended_run_may_have_lost_its_last_phase_only(tmp_path):
  config = get_config()
  config.num_rounds, config.phases.full_after = 10, 2
  settings = {name: config.to_dict()[name] for name in TRAINED_BY}
  workdir.write_json(tmp_path / 'config.json', config.to_dict())
  shorter = config.copy_and_resolve_references()
  shorter.num_rounds, shorter.phases.full_after = 8, 0
  workdir.check_ended(tmp_path, shorter.to_dict(), settings)
  workdir.write_json(tmp_path / 'config.json', shorter.to_dict())
  workdir.check_ended(tmp_path, shorter.to_dict(), settings)  # Again.
  shorter.phases.full_after = 1
  with pytest.raises(ConfigError, match=r'phases\.full_after 0 -> 1'):
    workdir.check_ended(tmp_path, shorter.to_dict(), settings)
  # A killed run has written its config, and trained no round by it.
  other = {**shorter.to_dict(), 'num_workers': 2}
  workdir.write_json(tmp_path / 'config.json', other)
  with pytest.raises(ConfigError, match='num_workers 4 -> 2'):
    workdir.check_ended(tmp_path, other, {**settings, 'num_workers': 4})
