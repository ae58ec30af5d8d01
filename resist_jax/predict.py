"""Command line: python -m resist_jax.predict RUN FILE... [--out=FILE.csv]."""

import sys

if __name__ == '__main__':
  from resist_jax.run.predict_command import main

  sys.exit(main())
