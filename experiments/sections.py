"""The tables and pictures of all committed results, in order.

README.md, RESULTS.md and the page of `experiments.site` are made from them.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import pathlib

from matplotlib.figure import Figure

from experiments import (
  ablation,
  accelerator,
  bench,
  checkpoint_cost,
  claims,
  deeper,
  digits,
  ensemble,
  healthy,
  levers,
  local_iterations,
  memory,
  protocols_report,
  quantised,
  slow_network,
  slow_report,
  storm,
  table1,
  table2,
  table3,
  tfds_catalog,
  to_accuracy,
  torch_peer,
  unequal,
)
from experiments.claims import Claim
from experiments.compile import tables as compiled
from experiments.experiment import Results
from experiments.pictures import Picture
from experiments.runs import RESULTS
from experiments.table import Table

EXPERIMENTS = tuple(
  module.EXPERIMENT
  for module in (
    to_accuracy,
    table2,
    table3,
    digits,
    ablation,
    levers,
    local_iterations,
    quantised,
    ensemble,
    deeper,
    healthy,
  )
)
SCALES = ('paper', 'cpu90', 'cpu')  # Smoke runs only show that a command works.
INTRODUCTION = (
  'These are the results of this implementation beside those that the paper '
  'reports (C. Dun, C. R. Wolfe, C. M. Jermaine, A. Kyrillidis, UAI 2022). '
  'Every number comes from a result file that is kept with the code, together '
  'with its configuration, seed, commit, versions and machine. The command '
  'above a table makes its results. Many commands train only what has no '
  'result yet: to train it again, name an empty folder with --results=FOLDER, '
  'or delete the result file where a command has no such option. Where a '
  'command has --only, --only=NAME makes one result, and most list all names '
  'if none fits, as with --only=names. Some commands take hours or days.',
  'At the cpu scale, a network with an eighth of the width trains for two '
  'epochs on two cores. Do not compare its accuracies with those of the paper. '
  'An accuracy of ours without ± is that of one run; ± is the standard '
  'deviation over two or three seeds. Differences of less than a point, or '
  'between fewer than three seeds, do not rank two methods.',
  'Two accuracies are reported. "Deployed" is the accuracy of the global '
  'network with fixed normalisation statistics, measured over training images '
  'after training, as a deployed model would have them. "Test-batch '
  'statistics" normalises each test batch with its own statistics, as the '
  'paper does.',
)


@dataclasses.dataclass(frozen=True)
class Section:
  """Tables and pictures under a title.

  Attributes:
    title: For readers.
    tables: At least one.
    figures: Pictures, made now, by name; empty where nobody asked for them.
    pictures: The committed files of the same pictures.
    claims: What the paper claims, and what the results say about it.
  """

  title: str
  tables: list[Table]
  figures: Mapping[str, Picture | Figure] = dataclasses.field(
    default_factory=dict
  )
  pictures: Sequence[pathlib.Path] = ()
  claims: Sequence[Claim] = ()


def sections(with_figures: bool = False) -> Iterator[Section]:
  """Yields a section for each experiment that has results.

  Args:
    with_figures: Whether to draw the pictures, too.

  Yields:
    The sections.
  """
  for experiment in EXPERIMENTS:
    for scale in (s for s in SCALES if s in experiment.scales):
      results = Results(experiment.name, scale)
      tables = list(experiment.tables(results))
      if tables:
        figures = experiment.pictures(results) if with_figures else {}
        pictures = sorted(results.folder().glob('*.png'))
        title = experiment.title
        if scale != 'cpu':
          title += f', {scale} scale'
        judge = claims.OF_EXPERIMENT.get(experiment.name)
        judged = judge(results) if judge else []
        yield Section(title, tables, figures, pictures, judged)
  slow = slow_report.tables()
  if slow:
    figures = slow_report.figures() if with_figures else {}
    pictures = sorted(slow_network.FOLDER.glob('*.png'))
    judged = claims.slow_links()
    yield Section('Slow links', slow, figures, pictures, judged)
  for name, title in protocols_report.TITLES.items():
    tables = list(protocols_report.tables(name))
    if tables:
      figures = protocols_report.figures(name) if with_figures else {}
      pictures = sorted((RESULTS / name / 'cpu').glob('*.png'))
      yield Section(title, tables, figures, pictures)
  others = (
    Section(
      'On an accelerator',
      [*accelerator.tables(), *torch_peer.accelerator_tables()],
    ),
    Section('Compiled for accelerators', list(compiled.tables())),
    Section(
      "The paper's count of bytes (Table 1)",
      list(table1.counts()),
      claims=claims.counts(),
    ),
    Section('On the wire', list(table1.wire()), claims=claims.wire()),
    Section('Workers of unequal speed', list(unequal.tables())),
    Section(
      'Hosts that are lost', [*storm.tables(), *checkpoint_cost.tables()]
    ),
    Section('Memory', list(memory.tables())),
    Section('Speed', [*bench.tables(), *torch_peer.tables()]),
    Section('Sets of the TFDS catalog', list(tfds_catalog.tables())),
  )
  yield from (section for section in others if section.tables)
