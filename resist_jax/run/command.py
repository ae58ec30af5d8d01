"""The command line: its flags, its cards, and its help.

`parse` turns words into `Options`, and raises a mistake instead of ending the
process. Nothing here imports JAX, so that `--help` answers at once.
"""

from collections.abc import Sequence, Set
import itertools
import re
import textwrap
from typing import Any, NamedTuple

from absl import flags
import ml_collections
from ml_collections import config_flags

import resist_jax
from resist_jax import folders
from resist_jax.errors import ConfigError, did_you_mean, message
from resist_jax.report.records import flatten
from resist_jax.run import cards, fields

_WIDTH = 79
# Each flag, as the help writes it, with its text.
_FLAGS = {
  'workdir=DIR': (
    'Folder of the run: required. The same command with the same folder goes '
    'on from the newest checkpoint.'
  ),
  'config=CARD': (
    'NAME, NAME:WORDS, FILE.py or FILE.py:WORDS, where WORDS are separated by '
    f'commas. Without this flag: {cards.DEFAULT}.'
  ),
  'config.FIELD=VALUE': 'Sets a field of the config (below).',
  'coordinator=HOST:PORT': 'Address of process 0, if a run has several.',
  'num_processes=N': (
    'Number of processes of the run. Without this flag: the number that SLURM, '
    'Open MPI or the TPU pod gives (with jax[k8s], also Kubernetes), otherwise '
    'one.'
  ),
  'process_id=I': 'Which of these processes this one is, from 0.',
  'help': 'Prints this text; --helpfull adds the flags of absl.',
  'version': 'Prints the version.',
}
_OPTIONS = 'model.options.'
# `config_flags` would join the values of all flags of a tuple. The last one
# counts, as for other fields.
_TUPLES = {
  f'config.{field.name}'
  for field in fields.each()
  if isinstance(field.default, tuple)
}
_HELP = ('-h', '-?', '-help', '-helpshort', '-helpfull')


class Options(NamedTuple):
  """What a command line asks for.

  Attributes:
    config: Config of the run; `checks.validate` has not seen it yet.
    workdir: Folder of the run.
    coordinator: `HOST:PORT` of process 0, if it was given.
    num_processes: Number of processes, if it was given.
    process_id: Number of this process, if it was given.
  """

  config: ml_collections.ConfigDict
  workdir: str
  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None


def define(values: flags.FlagValues) -> None:
  """Defines the flags, all but those of the config.

  Args:
    values: Where they are defined.
  """
  texts = {name.partition('=')[0]: text for name, text in _FLAGS.items()}
  for name in ('workdir', 'coordinator'):
    flags.DEFINE_string(name, None, texts[name], flag_values=values)
  for name, least in (('num_processes', 1), ('process_id', 0)):
    flags.DEFINE_integer(
      name, None, texts[name], lower_bound=least, flag_values=values
    )


def parse(argv: Sequence[str], values: flags.FlagValues) -> Options:
  """Reads a command line.

  Args:
    argv: The name of the program and its words.
    values: Flags, by `define` and of others.

  Returns:
    What the words ask for.

  Raises:
    ConfigError: On a mistake in a word, or in the card.
  """
  config, words = None, []
  try:
    argv = values.read_flags_from_files(argv, force_gnu=False)
    program, *words = argv
    found, words = _last_of({'config'}, words)
    config = cards.load(found.get('config', cards.DEFAULT))
    card = flatten(config.to_dict()).items()
    tuples = {f'config.{k}' for k, v in card if isinstance(v, tuple | list)}
    found, words = _last_of(_TUPLES | tuples, words)
    _make_settable(config, [*(f'--{name}=' for name in found), *words])
    words = [program, *(f'--{n}={v}' for n, v in found.items()), *words]
    config_flags.DEFINE_config_dict(
      'config', config, _FLAGS['config=CARD'], flag_values=values,
      sys_argv=words, allow_override=True,
    )  # fmt: skip
    rest = values(words)
  except flags.UnrecognizedFlagError as error:
    raise ConfigError(_unknown(error.flagname, values)) from error
  except flags.Error as error:
    raise ConfigError(message(error)) from error
  except (AttributeError, LookupError, TypeError) as error:
    raise ConfigError(_no_field(words, config)) from error
  except ConfigError:
    raise
  except ValueError as error:
    if 'malformed' in str(error):  # Python reads `num-workers` as a difference.
      raise ConfigError(_no_field(words, config)) from error
    raise ConfigError(  # Such as of `--config.=1`.
      f'a flag of the config cannot be read ({str(error)[:100]}): write '
      '--config.FIELD=VALUE.'
    ) from error
  if len(rest) > 1:
    raise ConfigError(f'unexpected argument {rest[1]!r}.')
  if not values['workdir'].value:
    raise ConfigError(
      '--workdir is missing: name the folder of the run, such as '
      '--workdir=runs/digits.'
    )
  given: dict[str, Any] = {name: values[name].value for name in Options._fields}
  given['workdir'] = str(folders.resolve(given['workdir'], '--workdir'))
  options = Options(**given)
  _check_processes(options)
  return options


def answer(argv: Sequence[str]) -> str | None:
  """Returns the text that --help or --version ask for, if one was given.

  Args:
    argv: The name of the program and its words.
  """
  words = [word.replace('--', '-', 1) for word in _before_dashes(argv)]
  if '-version' in words:
    return f'resist_jax {resist_jax.__version__}'
  asked = [word for word in words if word in _HELP]
  if not asked:
    return None
  more = '\n\n' + flags.FLAGS.get_help() if '-helpfull' in asked else ''
  return help_text() + more


def help_text() -> str:
  """Returns usage, examples, flags, cards, and all fields of a config."""
  card = cards.load(cards.DEFAULT)
  lines = [
    f'resist_jax {resist_jax.__version__}: trains a deep residual network as '
    'random shallow',
    'sub-networks on separate workers (ResIST, UAI 2022).',
    '',
    'Usage:',
    '  python -m resist_jax --workdir=DIR [--config=CARD] '
    '[--config.FIELD=VALUE ...]',
    '',
    'Examples:',
    '  python -m resist_jax --workdir=runs/digits',
    '  python -m resist_jax --workdir=runs/cifar10 --config=cifar10:s8 \\',
    '    --config.data.dir=FOLDER --config.seed=1',
    '',
    'Flags:',
    *_entries((f'--{name}', text) for name, text in _FLAGS.items()),
    '',
    'Cards:',
    *_entries((name, cards.about(name)) for name in cards.names()),
    '',
    *textwrap.wrap(
      'Fields of the config, each with its default, as in '
      '--config.num_rounds=20. A card sets some of them; where the card '
      f'{cards.DEFAULT} does, its value stands in brackets. Tuples of '
      'numbers need no parentheses: --config.partition=2,3. Those of names '
      """do: --config.data.extra_tests="('a', 'b')".""",
      _WIDTH,
    ),
  ]
  for heading, listed in fields.FIELDS.items():
    lines += ['', f'{heading}:']
    lines += _entries((_setting(field, card), field.reason) for field in listed)
  return '\n'.join(lines)


def _entries(pairs) -> list[str]:
  """Returns lines: each name, and its text indented below it."""
  lines = []
  for name, text in pairs:
    lines.append(f'  {name}')
    lines += textwrap.wrap(
      text, _WIDTH, initial_indent=' ' * 6, subsequent_indent=' ' * 6
    )
  return lines


def _setting(field: fields.Field, card: ml_collections.ConfigDict) -> str:
  """Returns a field with its default as one would type them."""
  value = fields.value_of(card, field.name)
  if isinstance(value, ml_collections.ConfigDict):
    value = value.to_dict()
  text = f'{field.name}={_typed(field.default)}'
  return text if value == field.default else f'{text}  [{_typed(value)}]'


def _typed(value) -> str:
  return str(value).replace(' ', '') if value != '' else "''"


def _make_settable(
  config: ml_collections.ConfigDict, words: Sequence[str]
) -> None:
  """Makes tuples of lists that words set, and refuses what none can set."""
  for word, following in itertools.zip_longest(words, words[1:], fillvalue=''):
    given = re.match(r'--?config\.([^=[]+)(=.*)?$', word, re.DOTALL)
    if not given:  # Or an element, such as --config.depths[0]=3.
      continue
    name, text = given[1], (given[2] or f'={following}')[1:].strip()
    value = fields.value_of(config, name)
    above, _, last = name.rpartition('.')
    section = fields.value_of(config, above) if above else config
    if isinstance(value, ml_collections.ConfigDict) and text[:1] != '{':
      first = next(iter(value), 'NAME')
      raise ConfigError(
        f'--config.{name} is a section, and {text!r} is not a dictionary of '
        f'its fields: set a field, such as --config.{name}.{first}.'
      )
    if section.get_type(last) is type(None):  # Not a placeholder of a type.
      raise ConfigError(
        f'--config.{name} is None in the card, so a flag cannot set it: let '
        'the card give a number, a text or a tuple there.'
      )
    if section.get_type(last) is list:  # Flags set tuples alone.
      with section.unlocked():
        del section[last]  # Else it would become a list again.
        section[last] = tuple(value)


def _before_dashes(argv: Sequence[str]) -> list[str]:
  words = list(argv[1:])
  return words[: words.index('--')] if '--' in words else words


def _last_of(
  names: Set[str], argv: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
  """Returns the last value of each of some flags, and the other words."""
  words, last, others = [*argv], {}, []
  while words:
    word = words.pop(0)
    if word == '--':
      others += [word, *words]
      break
    name, equals, value = re.sub('^--?', '', word, count=1).partition('=')
    if not word.startswith('-') or name not in names:
      others.append(word)
    elif equals or words:
      last[name] = value if equals else words.pop(0)
    else:
      raise ConfigError(f'--{name} has no value.')
  return last, others


def _check_processes(options: Options) -> None:
  _, _, coordinator, count, process = options
  if count == 1 or (coordinator, count, process) == (None, None, None):
    return
  if coordinator is None or count is None or process is None:
    raise ConfigError(
      '--coordinator, --num_processes and --process_id go together; under '
      'SLURM, Open MPI or on a TPU pod leave all of them out.'
    )
  if process >= count:
    raise ConfigError(
      f'--process_id is {process}; with --num_processes={count} it is '
      f'0 to {count - 1}.'
    )
  port = re.fullmatch(r'.+:(\d{1,5})', coordinator)
  if not port or not 0 < int(port[1]) < 2**16:
    raise ConfigError(
      f'--coordinator is {coordinator!r}; it must be HOST:PORT, with a port '
      'that is free on the host of process 0.'
    )


def _no_field(
  words: Sequence[str], config: ml_collections.ConfigDict | None
) -> str:
  """Returns a line about a field that the config has not."""
  known = sorted(flatten(config.to_dict())) if config is not None else []
  flags = (re.match(r'--?(?:no)?config\.([^=]+)', word) for word in words)
  names = [found[1] for found in flags if found]
  name = next((n for n in names if n not in known), 'of that name')
  options = [n.removeprefix(_OPTIONS) for n in known if n.startswith(_OPTIONS)]
  if name.startswith(_OPTIONS) and options:
    hint = did_you_mean(name.removeprefix(_OPTIONS), options, f'{_OPTIONS}{{}}')
    rest = f'The card sets {", ".join(options)} there.'
  else:
    hint, rest = did_you_mean(name, known), '--help lists all fields.'
  return f'unknown config field {name}. {hint}{rest}'


def _unknown(name: str, values: flags.FlagValues) -> str:
  """Returns a line about a flag that does not exist."""
  known = [*values, *(f'config.{field.name}' for field in fields.each())]
  field = f'config.{name}'
  hint = did_you_mean(field if field in known else name, known, '--{}')
  return f'unknown flag --{name}. {hint}--help lists all flags and fields.'
