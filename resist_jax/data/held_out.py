"""Which examples of a set are held out of the training: pure functions."""

import numpy as np

from resist_jax.data.order import mixed


def hold_out(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Holds out the test part of a set that has none: a fixed fifth of it.

  A pure function of the labels, by which every run holds out the same images.
  Both parts have the same shares of each class, and keep the order.

  Args:
    labels: `int[N]`, from 0.

  Returns:
    `(train, test)`: indices of examples.

  >>> train, test = hold_out(np.arange(20) % 2)
  >>> len(train), np.bincount(test % 2).tolist()
  (16, [2, 2])
  """
  parts = stratified(labels, max(1, round(len(labels) / 5)))
  train, test = (np.sort(part).astype(np.int64) for part in parts)
  return train, test


def random_parts(count: int, share: float) -> tuple[np.ndarray, np.ndarray]:
  """Holds out a random share of examples, the same in every run.

  Args:
    count: How many examples there are.
    share: The share to hold out, at least one example.

  Returns:
    `(rest, held_out)`: indices, ascending.
  """
  order = mixed(count)
  held_out = max(1, round(share * count))
  return np.sort(order[held_out:]), np.sort(order[:held_out])


def stratified(
  labels: np.ndarray, num_test: int
) -> tuple[np.ndarray, np.ndarray]:
  """Splits examples so that both parts hold the same shares of each class.

  Args:
    labels: `int[N]`, from 0.
    num_test: Examples to test on.

  Returns:
    `(train, test)`: indices, the same as those of scikit-learn's
    `train_test_split(..., random_state=0, stratify=labels)`.
  """
  rng = np.random.RandomState(0)

  def draw(counts: np.ndarray, total: int) -> np.ndarray:
    """Returns how many of each class to draw; largest remainders go first."""
    exact = counts / counts.sum() * total
    drawn = np.floor(exact)
    remainder = exact - drawn
    for value in np.unique(remainder)[::-1]:
      (tied,) = np.nonzero(remainder == value)
      missing = int(total - drawn.sum())
      if missing > 0:
        drawn[rng.choice(tied, min(len(tied), missing), replace=False)] += 1
    return drawn.astype(int)

  counts = np.bincount(labels)
  of_train = draw(counts, len(labels) - num_test)
  of_test = draw(counts - of_train, num_test)
  train, test = [], []
  for label, count in enumerate(counts):
    members = np.flatnonzero(labels == label)[rng.permutation(count)]
    train.extend(members[: of_train[label]])
    test.extend(members[of_train[label] :][: of_test[label]])
  return rng.permutation(train), rng.permutation(test)
