"""Before any test is imported."""

from __future__ import annotations

import os

# As many processes as cores run tests already. Where each of them has as many threads besides,
# these wait for each other, and what takes a minute takes ten.
os.environ.setdefault("OMP_NUM_THREADS", "1")
