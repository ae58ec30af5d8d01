"""Each library reads back what was written, and computes the same logits.

The libraries are extras: a format whose library is missing is skipped, but for
the line that says so.
"""

import functools
from functools import partial
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resist_jax import data
from resist_jax.errors import ConfigError
from resist_jax.models import ResNet, initial_params, without_gates
from resist_jax.run import (
  export,
  export_command,
  formats,
  plain,
  predict_command,
)

pytestmark = pytest.mark.filterwarnings('ignore')  # Those of the libraries.
NAMES = ('ant', 'bee', 'cow')
SMALL = {'num_classes': 3, 'stage_sizes': (2, 3), 'widths': (8, 16)}
NETWORKS = {
  'plain': {},
  'bottleneck': {'bottleneck': True},
  'group norm': {'norm': 'group', 'stem': 'strided'},
  'norm last': {'pre_activation': False, 'stem': 'imagenet'},
  'norm last, group': {'pre_activation': False, 'norm': 'group'},
  'whitened': {'stem': 'whitened'},
  'heads cut': {'cut_heads': True},
  'heads cut, norm last': {'cut_heads': True, 'pre_activation': False},
  'gates': {'gate': 0.7},
  'gates, norm last': {
    'gate': 0.7,
    'cut_heads': True,
    'pre_activation': False,
  },
}


def needs(package):
  missing = importlib.util.find_spec(package) is None
  return pytest.mark.skipif(missing, reason=f'{package} is not installed')


@functools.cache
def made(kind='plain'):
  """A network of random parameters whose statistics are those of images."""
  network = ResNet(**SMALL, **NETWORKS[kind])
  shape = (12, 12, 3)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32),
    initial_params(network, shape, seed=0),
  )
  scales = {'stage2_chain': np.full(2, 0.3, np.float32)}
  if network.cut_heads:
    scales['stage2_branch'] = np.full(1, 0.6, np.float32)
  mean, std = np.float32([0.5, 0.4, 0.3]), np.float32([0.2, 0.3, 0.25])
  pixels = data.normalise(jnp.asarray(images(50)), mean, std)
  measure = jax.jit(partial(network.apply, mutable=['batch_stats']))
  _, measured = measure({'params': params}, pixels, scales)
  statistics = jax.device_get(measured.get('batch_stats', {}))
  variables = {'params': params, 'batch_stats': statistics}
  return export.Predictor(network, variables, scales, mean, std, NAMES, shape)


def images(count):
  rng = np.random.default_rng(1)
  return rng.integers(0, 256, (count, 12, 12, 3)).astype(np.uint8)


@pytest.fixture(
  params=[
    'plain',
    'heads cut',
    'whitened',
    *(
      pytest.param(kind, marks=pytest.mark.slow)
      for kind in (
        'group norm',
        'norm last',
        'gates',
        'bottleneck',
        'norm last, group',
        'heads cut, norm last',
        'gates, norm last',
      )
    ),
  ]
)
def model(request):
  return made(request.param)


def close(found, model):
  wanted = model.logits(images(5))
  assert np.ptp(wanted) > 0.1
  np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-4)


@needs('torch')
def test_pytorch_reads_a_state_dict(model, tmp_path):
  import torch

  formats.write(model, 'torch', tmp_path / 'net')
  spec = importlib.util.spec_from_file_location(
    'exported', tmp_path / 'net' / 'network.py'
  )
  exported = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(exported)
  network = exported.load(tmp_path / 'net')
  pixels = torch.from_numpy(images(5).transpose(0, 3, 1, 2).copy())
  with torch.no_grad():
    close(network(pixels).numpy(), model)
  with pytest.raises(ValueError, match=r'give uint8 .* such as ToTensor'):
    network(pixels / 255)
  assert network.class_names == list(NAMES)


@needs('torch')
def test_pytorch_needs_nothing_else(tmp_path):
  formats.write(made(), 'torch', tmp_path / 'net')
  code = (
    'import sys, network, torch; net = network.load("."); '
    'print(tuple(net(torch.zeros(2, 3, 12, 12).byte()).shape)); '
    'assert not {"jax", "resist_jax"} & set(sys.modules)'
  )
  ran = subprocess.run(
    [sys.executable, '-c', code],
    cwd=tmp_path / 'net', capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert ran.returncode == 0, ran.stderr
  assert ran.stdout.strip() == '(2, 3)'


@needs('onnxruntime')
@needs('onnx')
def test_onnx_runtime_runs_a_graph(model, tmp_path):
  import onnxruntime

  path = tmp_path / 'model.onnx'
  formats.write(model, 'onnx', path)
  session = onnxruntime.InferenceSession(
    str(path), providers=['CPUExecutionProvider']
  )
  (logits,) = session.run(['logits'], {'images': images(5)})
  close(logits, model)
  (one,) = session.run(['logits'], {'images': images(5)[:1]})  # Any batch.
  np.testing.assert_allclose(one, logits[:1], rtol=1e-4, atol=1e-4)
  about = session.get_modelmeta().custom_metadata_map
  assert json.loads(about['class_names']) == list(NAMES)


@pytest.mark.parametrize('kind', ['torch', 'savedmodel'])
def test_only_a_whole_earlier_export_is_replaced(kind, tmp_path):
  """A file of somebody's own may have a name of ours."""
  (some, *_), others = formats.FORMATS[kind].files, formats.FORMATS[kind].others
  for names in ([some], [*others], [*formats.FORMATS[kind].files, 'mine']):
    folder = tmp_path / '_'.join(names)
    folder.mkdir()
    for name in names:
      (folder / name).write_text('')
    with pytest.raises(ConfigError, match='a folder that holds other things'):
      formats.check(kind, folder)
  formats.check(kind, tmp_path / 'new')
  whole = tmp_path / 'whole'
  whole.mkdir()
  for name in (*formats.FORMATS[kind].files, *others):
    (whole / name).write_text('')
  formats.check(kind, whole)


LOAD = """
import sys, numpy as np, tensorflow as tf
loaded = tf.saved_model.load(sys.argv[1])
images = tf.constant(np.load(sys.argv[2]))
logits = loaded.signatures['serving_default'](images=images)['logits']
np.save(sys.argv[3], logits.numpy())
print(*[name.decode() for name in loaded.class_names.numpy()])
"""


@needs('tensorflow')
@pytest.mark.parametrize('kind', ['plain', 'norm last, group'])
def test_tensorflow_loads_a_saved_model(kind, tmp_path):
  """In processes of their own: TensorFlow refuses the flags of the tests."""
  model = made(kind)
  export.save(tmp_path, model)
  (tmp_path / 'config.json').write_text('{}')
  np.save(tmp_path / 'images.npy', images(5))
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  saved, found = tmp_path / 'saved', tmp_path / 'logits.npy'
  for words in (
    ['-m', 'resist_jax.export', tmp_path, '--to=savedmodel', f'--out={saved}'],
    ['-c', LOAD, saved, tmp_path / 'images.npy', found],
  ):
    ran = subprocess.run(
      [sys.executable, *map(str, words)],
      env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
  assert ran.stdout.split() == list(NAMES)
  close(np.load(found), model)


@needs('safetensors')
def test_safetensors_hold_every_array(model, tmp_path):
  from safetensors import safe_open
  from safetensors.numpy import load_file

  path = tmp_path / 'model.safetensors'
  formats.write(model, 'safetensors', path)
  variables, scales = {}, {}
  for name, array in load_file(path).items():
    *place, last = name.split('/')
    at = variables
    for part in place:
      at = at.setdefault(part, {})
    at[last] = array
  scales = variables.pop('scales')
  with safe_open(path, 'numpy') as file:
    about = {k: json.loads(v) for k, v in file.metadata().items()}
  assert about['class_names'] == list(NAMES)
  mean, std = np.float32(about['mean']), np.float32(about['std'])
  names = 'norm', 'stem', 'bottleneck', 'pre_activation', 'cut_heads', 'gate'
  sizes = {k: tuple(about[k]) for k in ('stage_sizes', 'widths')}
  same = {name: about[name] for name in names}
  assert ResNet(num_classes=3, **sizes, **same) == model.network
  again = export.Predictor(
    model.network, {'batch_stats': {}, **variables}, scales, mean, std,
    NAMES, tuple(about['image_shape']),
  )  # fmt: skip
  np.testing.assert_array_equal(
    again.logits(images(5)), model.logits(images(5))
  )


def test_the_plain_layers_are_those_of_the_network(model):
  """By their number of parameters, which needs no other library."""
  arrays = plain.arrays(model)
  params = model.variables['params']
  ours = jax.tree.leaves(without_gates(params, model.network))
  extra = ('mean', 'std', 'num_batches_tracked', 'running_mean', 'running_var')
  theirs = [a for n, a in arrays.items() if not n.endswith(extra)]
  assert sum(a.size for a in theirs) == sum(x.size for x in ours)


def test_probabilities_are_those_of_the_logits():
  model = made()
  shares = np.exp(np.float64(model.logits(images(5))))
  shares /= shares.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(model(images(5)), shares, rtol=1e-5)


# The command.


def command(capsys, *words):
  code = export_command.main([*map(str, words)])
  printed = capsys.readouterr()
  return code, printed.out, printed.err


@pytest.fixture
def run(tmp_path):
  """What a finished run leaves, as far as this command reads it."""
  export.save(tmp_path / 'run', made())
  (tmp_path / 'run' / 'config.json').write_text('{}')
  return tmp_path / 'run'


@needs('safetensors')
def test_the_command_prints_where(run, capsys, tmp_path):
  code, out, _ = command(capsys, run, '--to=safetensors')
  assert code == 0
  assert out.strip() == str(run / 'exported' / 'model.safetensors')
  path = tmp_path / 'other' / 'net.safetensors'
  assert command(capsys, run, '--to=safetensors', f'--out={path}')[0] == 0
  assert path.stat().st_size > 1000


@needs('torch')
def test_an_export_that_stops_leaves_the_one_before(tmp_path, monkeypatch):
  formats.write(made(), 'torch', tmp_path / 'net')
  before = {p.name: p.read_bytes() for p in (tmp_path / 'net').iterdir()}
  with monkeypatch.context() as patch:
    patch.setattr(formats.plain, 'describe', lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      formats.write(made('group norm'), 'torch', tmp_path / 'net')
  after = {p.name: p.read_bytes() for p in (tmp_path / 'net').iterdir()}
  assert after == before
  formats.write(made('group norm'), 'torch', tmp_path / 'net')
  assert (tmp_path / 'net' / 'network.pt').read_bytes() != before['network.pt']
  assert [p.name for p in tmp_path.iterdir()] == ['net']


@pytest.mark.parametrize('kind', formats.FORMATS)
def test_nothing_else_is_replaced(kind, run, capsys, tmp_path):
  """Needs no library: the place is looked at first."""
  own = tmp_path / 'own'
  own.mkdir()
  (own / 'thesis.tex').write_text('mine')
  code, _, err = command(capsys, run, f'--to={kind}', f'--out={own}')
  (line,) = err.splitlines()
  assert code == 2
  assert 'a folder' in line
  assert ('thesis.tex' in line) == bool(formats.FORMATS[kind].files)
  assert [p.name for p in own.iterdir()] == ['thesis.tex']
  beside = own / 'thesis.tex' / 'model'
  code, _, err = command(capsys, run, f'--to={kind}', f'--out={beside}')
  assert (code, len(err.splitlines())) == (2, 1)
  assert 'is not a folder' in err


@pytest.mark.parametrize('kind', formats.FORMATS)
def test_without_the_library_one_line_says_which(
  kind, run, capsys, monkeypatch
):
  package = formats.FORMATS[kind].package
  monkeypatch.setitem(sys.modules, package, None)  # As if it were not there.
  code, _, err = command(capsys, run, f'--to={kind}')
  (line,) = err.splitlines()
  assert code == 2
  assert f'pip install {package}' in line


def test_a_folder_without_a_run_is_refused(capsys, tmp_path):
  code, _, err = command(capsys, tmp_path, '--to=onnx')
  assert (code, len(err.splitlines())) == (2, 1)
  assert 'holds no finished run' in err


@pytest.mark.parametrize(
  ('seeds', 'says'), [(1, '1 finished run '), (7, '7 fi')]
)
def test_a_folder_of_several_runs_is_refused(seeds, says, capsys, tmp_path):
  for seed in range(seeds):
    (tmp_path / f'seed{seed}' / export.FOLDER).mkdir(parents=True)
  for main, words in (
    (export_command.main, ['--to=onnx']),
    (predict_command.main, ['photo.png']),
  ):
    assert main([str(tmp_path), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert f'name one, such as {tmp_path / "seed0"}.' in line
    assert ('...' in line) == (seeds > 5)
