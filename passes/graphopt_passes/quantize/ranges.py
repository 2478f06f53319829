from graphopt.statistics import Spread


def candidate_ranges(spread: Spread) -> dict[str, tuple[float, float]]:
    return {"min-max": (spread.low, spread.high)}
