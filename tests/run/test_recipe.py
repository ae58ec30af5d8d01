"""What a recipe may add: smooth labels, and flips that alternate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resist_jax import data, models
from resist_jax.errors import ConfigError
from resist_jax.run import (
  checks,
  export,
  optimizer,
  resnet_task,
  setup,
  train,
)
from resist_jax.run import config as config_lib


def tiny_config(**fields):
  config = config_lib.get_config()
  config.model.name = 'PreActResNet18'
  config.model.stage_sizes, config.model.widths = (1, 6), (8, 8)
  config.partition = (2,)
  config.num_rounds, config.local_steps, config.batch_size = 3, 2, 8
  config.eval_every, config.checkpoint_every = 3, 1
  config.evaluation.statistics_images = 200
  config.log.report = config.log.tensorboard = False
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  checks.validate(config)
  return config


@pytest.mark.parametrize('smoothing', [0.0, 0.2])
def test_smooth_labels_by_hand(smoothing):
  """Cross entropy with `smoothing / classes` on each class, the rest as is."""
  config = tiny_config(**{
    'label_smoothing': smoothing, 'data.augment': 'none'
  })  # fmt: skip
  digits = data.load('digits')
  task = resnet_task.make(config, digits, 'cpu')
  params = task.init(0)
  x, y = digits.train.images[:16], digits.train.labels[:16]
  loss_fn = jax.jit(task.make_loss({}, None))
  loss, found = loss_fn(params, {}, (x, y), jax.random.key(0))
  pixels = data.normalise(jnp.array(x), digits.mean, digits.std)
  logits = jax.jit(task.network.apply)({'params': params}, pixels)
  logits = np.asarray(logits, np.float64)
  log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  target = np.full((16, 10), smoothing / 10)
  target[np.arange(16), y] += 1 - smoothing
  want = -(target * log_p).sum(axis=1).mean()
  assert float(loss) == pytest.approx(want, rel=1e-5)
  assert found['accuracy'] == (logits.argmax(axis=1) == y).mean()


WEIGHT, TEMPERATURE = 0.3, 2.0


@pytest.fixture
def distilled():
  """`(loss(params, agreed=params), logits(params), params, others)`."""
  config = tiny_config(**{
    'distillation.weight': WEIGHT, 'distillation.temperature': TEMPERATURE,
    'model.stage_sizes': (1, 3), 'num_workers': 2, 'data.augment': 'none',
  })  # fmt: skip
  digits = data.load('digits')
  task = resnet_task.make(config, digits, 'cpu')
  x, y = digits.train.images[:16], digits.train.labels[:16]
  pixels = data.normalise(jnp.array(x), digits.mean, digits.std)
  loss_fn = task.make_loss({}, None)

  def loss(params, **agreed):
    return loss_fn(params, {}, (x, y), jax.random.key(0), **agreed)[0]

  def logits(params):
    return task.network.apply({'params': params}, pixels)

  return loss, logits, task.init(0), task.init(1)


def test_distillation_by_hand(distilled):
  """Both networks see the same images; the labels have the rest."""
  loss, logits, params, agreed = distilled

  @jax.jit
  def parts(params, agreed):
    # A test has no network that was agreed on.
    both = loss(params, agreed=agreed), loss(params)
    return both, logits(params), logits(agreed)

  (got, labels), *found = parts(params, agreed)
  log_p, log_q = (
    x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    for x in (np.asarray(x, np.float64) / TEMPERATURE for x in found)
  )
  away = (np.exp(log_q) * (log_q - log_p)).sum(axis=1).mean()
  want = (1 - WEIGHT) * float(labels) + WEIGHT * TEMPERATURE**2 * away
  assert float(got) == pytest.approx(want, rel=1e-4)
  assert away > 0.01


@pytest.mark.slow
def test_distillation_has_no_gradient_where_a_round_begins(distilled):
  loss, _, params, _ = distilled
  gradient = jax.jit(jax.grad(loss))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      x, (1 - WEIGHT) * y, rtol=1e-3, atol=1e-5
    ),
    gradient(params, agreed=params),
    gradient(params),
  )


def test_a_number_below_zero_asks_for_the_mirror_image():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
  examples = data.as_rows(images), jnp.arange(5)
  numbers = jnp.array([3, ~3, 0, ~0])
  got, labels = data.pick(examples, numbers, (4, 4, 3), mirrors=True)
  mirrored = images[:, :, ::-1]
  want = np.stack([images[3], mirrored[3], images[0], mirrored[0]])
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(labels, [3, 3, 0, 0])


def test_alternating_flips_reach_the_loss():
  """The loss of what the pipeline asks for is that of images flipped by hand,
  whatever the number of devices."""
  fields = {'data.augment': 'flip', 'data.flips': 'alternating'}
  one, two = (
    setup.prepare(tiny_config(**fields, num_devices=D)) for D in (1, 2)
  )
  numbers = one.pipeline.batches(1)
  np.testing.assert_array_equal(numbers, two.pipeline.batches(1))
  batch = numbers[0, 0]
  assert 0 < (batch < 0).sum() < len(batch)
  train = one.dataset.train
  which = np.maximum(batch, ~batch)
  images = train.images[which].copy()
  images[batch < 0] = images[batch < 0, :, ::-1]
  loss_fn, params = jax.jit(one.task.make_loss({}, None)), one.task.init(0)
  key = jax.random.key(0)
  got, _ = loss_fn(params, {}, jnp.array(batch), key, one.pipeline.constants)
  want, _ = loss_fn(params, {}, (images, train.labels[which]), key)
  assert float(got) == float(want)
  other, _ = loss_fn(
    params, {}, (train.images[which], train.labels[which]), key
  )
  assert float(got) != float(other)


def test_whitened_patches_are_uncorrelated():
  """Each filter, and none of its negatives, over the images it was made of."""
  rng = np.random.default_rng(0)
  smooth = np.cumsum(rng.normal(size=(200, 8, 9, 3)), axis=1)
  images = (smooth @ rng.normal(size=(3, 3))).astype(np.float32)
  kernel = models.whitening(images)
  assert kernel.shape == (2, 2, 3, 24)
  np.testing.assert_array_equal(kernel[..., 12:], -kernel[..., :12])
  found = jax.lax.conv_general_dilated(
    images, kernel[..., :12], (1, 1), 'VALID',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  ).reshape(-1, 12)  # fmt: skip
  found = np.asarray(found, np.float64)
  np.testing.assert_allclose(
    found.T @ found / len(found), np.eye(12), atol=0.01
  )


def test_the_last_bits_of_images_change_no_sign_of_a_whitening_filter():
  """Hosts add in other orders, and a plain edge makes many numbers equal."""
  rng = np.random.default_rng(0)
  images = np.zeros((50, 12, 12, 1))
  images[:, 2:-2, 2:-2] = rng.normal(size=(50, 8, 8, 1))
  kernel = models.whitening(images)
  for _ in range(20):
    noisy = images * (1 + 1e-13 * rng.normal(size=images.shape))
    np.testing.assert_allclose(models.whitening(noisy), kernel, atol=1e-4)


def test_whitening_is_measured_on_images_of_all_classes(monkeypatch):
  """Also if they are sorted by class."""
  monkeypatch.setattr(resnet_task, 'WHITENING_PIXELS', 8 * 64)
  grey = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
  grey[20:] = grey[20:, :1, :1]  # The images of class 1 are plain.
  config = tiny_config(**{'model.stem': 'whitened'})
  kernels = []
  for images in (grey, grey[::-1]):
    given = data.from_arrays(images, np.arange(40) // 20)
    given = dataclasses.replace(given, mean=np.zeros(1), std=np.ones(1))
    task = setup.prepare(setup.naming(config, given), given).task
    kernels.append(np.asarray(task.init(0)['stem']['whitening']))
  spread = [np.abs(kernel).max() for kernel in kernels]
  assert 0.5 < spread[0] / spread[1] < 2


@pytest.mark.parametrize('protocol', ['resist', 'data_parallel'])
def test_whitening_filters_stay_what_they_were_measured(protocol, tmp_path):
  config = tiny_config(**{
    'model.stem': 'whitened', 'protocol': protocol, 'num_workers': 2,
    'optimizer.weight_decay': 0.1, 'optimizer.momentum': 0.9,
    'optimizer.bias_rate': 64.0, 'optimizer.carry_momentum': True,
  })  # fmt: skip
  before = setup.prepare(config).task.init(0)['stem']
  train.train(config, tmp_path)
  after = export.load(tmp_path).variables['params']['stem']
  np.testing.assert_array_equal(after['whitening'], before['whitening'])
  assert np.abs(after['kernel'] - before['kernel']).max() > 1e-3


@pytest.mark.parametrize('norm', ['batch', 'group'])
def test_a_rate_of_biases_is_that_of_norms_alone(norm):
  """The step of a norm's bias is that of a gradient so many times as large."""
  fields = {'model.norm': norm}
  config = tiny_config(**fields, **{'optimizer.bias_rate': 64.0})
  params = setup.prepare(config).task.init(0)
  params = jax.tree.map(jnp.zeros_like, params)  # Nothing decays.
  grads = jax.tree.map(jnp.ones_like, params)

  def step(config):
    made = optimizer.described(config.optimizer, lambda _: 0.1)
    return made.update(grads, made.init(params), params)[0]

  steps = step(config), step(tiny_config(**fields))
  biases = 0
  for (path, x), (_, y) in zip(
    *map(jax.tree.leaves_with_path, steps), strict=True
  ):
    name = jax.tree_util.keystr(path)
    biased = 'norm' in name and name.endswith("['bias']")
    np.testing.assert_allclose(x, 64 * y if biased else y, rtol=1e-5)
    biases += biased
  assert biases == 6  # Two in each head and in the chain.


def test_a_rate_of_biases_needs_some():
  made = optimizer.make_optimizer(lambda _: 0.1, 0.9, 0.0, bias_rate=2.0)
  params = {'dense': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}}
  with pytest.raises(ConfigError, match=r'optimizer.bias_rate is 2.0, .*to 1'):
    made.update(params, made.init(params), params)
