"""How the time of the recipe basic grows with the number of nodes.

    python tests/benchmarks/scaling.py [--nodes 1000 2000 5000 10000 20000 50000]

Nothing is validated or timed, so that what is measured are the passes and what is around them.
Times are of the processor, which other work on the machine does not lengthen; those of the passes,
in the last column, are by the clock.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from mixed_graph import mixed_graph

import graphopt
from graphopt.operators import node_count

SLOWEST = 3


def row(nodes: int) -> str:
    proto = mixed_graph(nodes)
    before = node_count(graphopt.load(proto))
    started = time.process_time()
    run = graphopt.optimize(proto, recipe="basic", validate=False, benchmark=False)
    seconds = time.process_time() - started
    spent: Counter[str] = Counter()
    for step in run.steps:
        spent[step.spec] += step.seconds  # type: ignore[assignment]  # counts need not be whole
    slowest = ", ".join(f"{name} {took:.1f}" for name, took in spent.most_common(SLOWEST))
    per_node_ns = f"{seconds / before * 1e9:,.0f}"
    rounds = max(step.round for step in run.steps)
    cells = [before, run.optimized.nodes, rounds, f"{seconds:.2f}", per_node_ns, slowest]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    sizes = [1000, 2000, 5000, 10000, 20000, 50000]
    parser.add_argument("--nodes", type=int, nargs="+", default=sizes)
    print("| nodes | after | rounds | seconds | ns per node | of these the slowest, seconds |")
    print("|---|---|---|---|---|---|")
    for nodes in parser.parse_args().nodes:
        print(row(nodes), flush=True)


if __name__ == "__main__":
    main()
