"""Why a place that looks right is left alone."""


class Misfit(Exception):
    """A place that a fusion must leave alone; the message says why, and goes into the ledger."""
