"""Cards are found, flags combine, and --help lists every field."""

import os
import pathlib
import re
import subprocess
import sys

from absl import flags
import pytest

import resist_jax
from resist_jax import __main__ as program
from resist_jax import models
from resist_jax.errors import ConfigError
from resist_jax.run import cards, checks, command, fields

CONFIGS = pathlib.Path(__file__).parent.parent / 'experiments' / 'configs'


def parse(*words):
  values = flags.FlagValues()
  command.define(values)
  return command.parse(['resist_jax', '--workdir=run', *words], values)


def test_without_a_card_it_is_the_digits():
  options = parse('--config.num_workers=2')
  expected = cards.load('digits')
  expected.num_workers = 2
  assert options.config.to_dict() == expected.to_dict()
  assert options.workdir == 'run'
  assert options[2:] == (None, None, None)


@pytest.mark.parametrize('name', cards.names())
def test_a_card_is_valid_and_found_by_name_and_by_path(name):
  for words in ('', 'smoke'):
    colon = f':{words}' if words else ''
    config = parse(f'--config={name}{colon}').config
    checks.validate(config)
    assert config.to_dict() == cards.load(f'{name}:{words}').to_dict()
    by_path = parse('--config', f'{CONFIGS / name}.py{colon}').config
    assert by_path.to_dict() == config.to_dict()


def test_every_card_that_ships_is_there_by_path():
  ours = {'__init__', 'language'}  # Its network is that of an experiment.
  assert {path.stem for path in CONFIGS.glob('*.py')} == {*ours, *cards.names()}


def test_a_card_says_its_command_and_its_words():
  for name in cards.names():
    text = (cards.FOLDER / f'{name}.py').read_text()
    assert f'Command: python -m resist_jax --config={name}' in text
    assert 'Words: ' in cards.about(name)


def test_the_last_of_several_flags_counts_whatever_its_type():
  config = parse(
    '--config.partition=(1,)',
    '--config.lr=1.0',
    '--config.partition',
    '2,3',
    '--config.lr=2.0',
    '--config.depths=(1, 2)',
    '--config.depths=(3, 4)',
    '--config.data.extra_tests=a',
    '--config.data.sharded',
    '--noconfig.data.sharded',
  ).config
  assert config.partition == (2, 3)
  assert config.lr == 2.0
  assert config.depths == (3, 4)
  assert config.data.extra_tests == ('a',)
  assert config.data.sharded is False


# Of each tuple: a value that a flag gives, and what is read.
VALUES = {
  'partition': ('1,2', (1, 2)),
  'depths': ('5,7', (5, 7)),
  'optimizer.drops': ('0.25,0.5', (0.25, 0.5)),
  'data.extra_tests': ("('a','b')", ('a', 'b')),
  'model.stage_sizes': ('1,2,3', (1, 2, 3)),
  'model.widths': ('8,16', (8, 16)),
}


def test_each_tuple_has_a_value_here():
  tuples = [f.name for f in fields.each() if isinstance(f.default, tuple)]
  assert sorted(VALUES) == sorted(tuples)


@pytest.mark.parametrize('first', ['--config.{}=9', '--config.{} 9'])
@pytest.mark.parametrize('last', ['--config.{}={}', '-config.{} {}'])
@pytest.mark.parametrize('name', VALUES)
def test_the_last_of_two_flags_of_a_tuple_counts(name, first, last):
  text, value = VALUES[name]
  words = f'{first} {last}'.format(name, name, text).split()
  found = parse(*words).config
  for part in name.split('.'):
    found = found[part]
  assert found == value


@pytest.mark.parametrize(
  ('word', 'says'),
  [
    ('model=PreActResNet18', r'model is a section, .* --config\.model\.'),
    ('data=./photos', r'data is a section'),
    ('data.name.x=1', r'unknown config field data\.name\.x'),
    ('model.options.none=5', r'options\.none is None in the card'),
    ('model.options.none', r'options\.none is None in the card'),
    ('model', r'model is a section'),
    ('model.options.a.b=5', r'unknown config field model\.options\.a\.b'),
  ],
)
def test_a_flag_that_sets_no_value_is_told_in_one_line(word, says, own_card):
  with pytest.raises(ConfigError, match=says) as error:
    parse(f'--config={own_card}', f'--config.{word}')
  assert '\n' not in str(error.value)


@pytest.fixture
def own_card(tmp_path):
  card = tmp_path / 'card.py'
  card.write_text(
    'import os\n'
    'from ml_collections import FieldReference, FrozenConfigDict\n'
    'from ml_collections.config_dict import placeholder\n'
    'from resist_jax.run import fields\n'
    'def get_config(frozen=""):\n'
    '  config = fields.get_config()\n'
    '  config.model.module = "own"\n'
    '  config.model.options = {"none": None, "sizes": [1, 2], "a": 3}\n'
    '  config.model.options.number = placeholder(int)\n'
    '  config.model.options.any = FieldReference([1], field_type=object)\n'
    '  config.depths = [8, 6, 4, 4]\n'
    '  os.chdir(os.path.dirname(__file__))\n'
    '  return FrozenConfigDict(config) if frozen else config\n'
  )
  return card


def test_an_option_that_is_a_list_can_be_set(own_card):
  words = ('--config.model.options.sizes=3', '--config.model.options.sizes=4,5')
  options = parse(f'--config={own_card}', *words).config.model.options
  assert options.sizes == (4, 5)


@pytest.mark.parametrize(
  ('word', 'name', 'value'),
  [
    ('model.options.number=5', 'model.options.number', 5),
    ('model.options.any=x', 'model.options.any', 'x'),
    ('model.options.sizes[0]=7', 'model.options.sizes', (7, 2)),
    ('depths=4,4,4,4', 'depths', (4, 4, 4, 4)),
    ('depths=by_speed', 'depths', 'by_speed'),
    ('depths[0]=3', 'depths', (3, 6, 4, 4)),
  ],
)
def test_flags_set_what_a_card_left_open(word, name, value, own_card):
  config = parse(f'--config={own_card}', f'--config.{word}').config
  found = fields.value_of(config, name)
  assert (tuple(found) if isinstance(found, list) else found) == value


@pytest.mark.parametrize('gone', [True, False])
def test_a_card_of_the_package_needs_no_working_directory(gone, tmp_path):
  """The folder may be removed, or may not be entered by this user."""
  here = tmp_path / 'here'
  here.mkdir()
  program = (
    'import os, sys\n'
    'from resist_jax.run import cards\n'
    'os.rmdir(os.getcwd()) if sys.argv[1:] else os.chmod(".", 0)\n'
    'print(cards.load("digits").num_workers)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', program, *['gone'] * gone],
    cwd=here, capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert done.stdout == '4\n'


def test_a_card_changes_neither_the_folder_nor_what_flags_can_set(own_card):
  before = os.getcwd()
  config = parse(f'--config={own_card}:frozen', '--config.lr=0.5').config
  assert config.lr == 0.5
  assert os.getcwd() == before


def test_a_flag_without_a_field_is_told_in_one_line():
  with pytest.raises(
    ConfigError, match=r'write --config\.FIELD=VALUE'
  ) as error:
    parse('--config.')
  assert '\n' not in str(error.value)


def test_fields_override_a_card_that_comes_after_them():
  config = parse(
    '--config=imagenet', '--config.seed=3', '--config=cifar10:s8'
  ).config
  assert config.seed == 3
  assert config.data.name == 'cifar10'
  assert config.num_workers == 8


def test_flags_in_a_file(tmp_path):
  file = tmp_path / 'flags'
  file.write_text('--config=cifar100:s2\n--config.partition=2\n')
  config = parse(f'--flagfile={file}', '--config.partition=3').config
  assert (config.data.name, config.partition) == ('cifar100', (3,))


def test_the_last_flag_of_an_option_that_is_a_tuple_counts(tmp_path):
  card = tmp_path / 'card.py'
  card.write_text(
    'from resist_jax.run import fields\n'
    'def get_config():\n'
    '  config = fields.get_config()\n'
    "  config.model.options = {'widths': (8, 16), 'deep': {'sizes': (1,)}}\n"
    '  return config\n'
  )
  names = ('model.options.widths', 'model.options.deep.sizes')
  words = [f'--config.{n}={v}' for v in ('1,2', '3,4') for n in names]
  options = parse(f'--config={card}', *words).config.model.options
  assert options.widths == options.deep.sizes == (3, 4)


def test_each_field_has_a_reason():
  flat = {}

  def walk(config, prefix=''):
    for name, value in config.items():
      if value and isinstance(value, dict):
        walk(value, f'{prefix}{name}.')
      else:
        flat[prefix + name] = value

  walk(fields.get_config().to_dict())
  assert flat == {field.name: field.default for field in fields.each()}
  for field in fields.each():
    assert len(field.reason.split()) > 3, field.name
    assert field.reason.endswith('.'), field.name
  assert len(flat) == len(list(fields.each()))


def test_the_reason_of_the_model_lists_the_models():
  (reason,) = [f.reason for f in fields.each() if f.name == 'model.name']
  for name in set(models.FAMILY) - {'PreActResNet101'}:
    family, size = re.fullmatch(r'(PreAct\w*ResNet)(\w+)', name).groups()
    assert re.search(rf'{family}[^P]*\b{size}\b|{name}', reason), name


def test_two_configs_share_nothing():
  first, second = fields.get_config(), fields.get_config()
  first.depths, first.data.dir = (1, 2), 'folder'
  assert second.depths == ()
  assert second.data.dir == ''


@pytest.mark.parametrize('flag', ['--help', '-h', '--helpshort'])
def test_help_lists_flags_cards_and_fields(flag):
  text = command.answer(['resist_jax', '--workdir=run', flag])
  lines = text.splitlines()
  assert max(map(len, lines)) <= 80
  usage, flags_at = lines.index('Usage:'), lines.index('Flags:')
  fields_at = lines.index('Workers and rounds:')
  assert usage < lines.index('Examples:') < flags_at < fields_at
  assert '  --workdir=DIR' in lines[flags_at:fields_at]
  for name in cards.names():
    assert f'  {name}' in lines
  words = ' '.join(text.split())
  for field in fields.each():
    assert f'  {field.name}=' in text
    assert ' '.join(field.reason.split()) in words
  assert '  num_rounds=100  [20]' in lines
  assert "  data.dir=''" in lines
  assert '--verbosity' not in text


def test_no_help_where_nobody_asks():
  assert command.answer(['resist_jax', '--workdir=run']) is None
  assert command.answer(['resist_jax', '--', '--help']) is None
  assert '--verbosity' in command.answer(['resist_jax', '--helpfull'])


def test_help_and_version_are_answered_with_0(capsys):
  for flag, says in (('--help', 'Usage:'), ('--version', 'resist_jax ')):
    with pytest.raises(SystemExit) as end:
      program.parse(['resist_jax', flag])
    assert end.value.code == 0
    assert says in capsys.readouterr().out
  version = command.answer(['resist_jax', '--version'])
  assert version == f'resist_jax {resist_jax.__version__}'


@pytest.mark.parametrize(
  ('module', 'needed'),
  [
    ('resist_jax.__main__', set()),
    ('resist_jax.data', set()),
    ('resist_jax.run.train', {'orbax', 'tensorboardX'}),
  ],
)
def test_what_is_slow_is_imported_when_it_is_needed(module, needed):
  slow = {
    'grain', 'matplotlib', 'orbax', 'sklearn', 'tensorboardX', 'tensorflow',
    'tensorflow_datasets',
  } - needed  # fmt: skip
  code = f'import sys, {module}; print(*{slow} & set(sys.modules))'
  command = [sys.executable, '-c', code]
  result = subprocess.run(command, capture_output=True, text=True, check=True)
  assert result.stdout.split() == []


def test_a_card_of_many_words_shows_them_all():
  assert 'cpu90' in cards.about('cifar10')
  assert not cards.about('cifar10').endswith(',.')


def test_a_function_is_read_anew_each_time(tmp_path):
  """As in a notebook, beside which somebody edits the file."""
  path = tmp_path / 'rates.py'
  for value in (1, 2):
    path.write_text(f'def rate(): return {value}\n')
    os.utime(path, (value, value))
    assert cards.function(f'{path}:rate')() == value
