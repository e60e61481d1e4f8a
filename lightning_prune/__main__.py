"""``python -m lightning_prune``."""

import sys

from lightning_prune.cli import main

sys.exit(main())
