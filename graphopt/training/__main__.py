"""`torchrun --nproc_per_node=N -m graphopt.training CONFIG`: `graphopt train` in each process."""

from __future__ import annotations

import sys

from graphopt.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
