"""Command line: python -m resist_jax.report RUN... [--out=OUT]."""

import sys

from resist_jax.report.page import main

sys.exit(main())
