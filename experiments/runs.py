"""A training run that leaves a result file with its provenance."""

from collections.abc import Sequence
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

from experiments.provenance import provenance

CONFIGS = pathlib.Path(__file__).parent / 'configs'


def run(
  card: str,
  flags: Sequence[str],
  target: pathlib.Path,
  picture: pathlib.Path | None = None,
) -> None:
  """Trains once and keeps what a reader needs to check it.

  Args:
    card: A config file in experiments/configs, with its scale.
    flags: Of the command line, besides `--config` and `--workdir`.
    target: The result file; its folder is made. Where it exists, nothing is
      done.
    picture: Where to keep the picture of who trained which block, if wanted.
  """
  if target.exists():
    return
  target.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder) / target.stem.split('_seed')[0]
    program = [sys.executable, '-m', 'resist_jax']
    where = [f'--config={CONFIGS / card}', f'--workdir={workdir}']
    subprocess.run([*program, *where, *flags], check=True)
    summary = json.loads((workdir / 'summary.json').read_text())
    kind = summary['device'].split(',')[0]
    record = {
      'provenance': provenance(f'{summary["num_devices"]} x {kind}'),
      'config': json.loads((workdir / 'config.json').read_text()),
      'summary': summary,
    }
    record['config']['data']['dir'] = ''  # A place on one machine.
    if picture:
      shutil.copy(workdir / 'decomposition.png', picture)
  target.write_text(json.dumps(record, indent=2) + '\n')
