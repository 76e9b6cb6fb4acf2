"""`mpilsgd reproduce`: the figures and tables of the papers, each with the paper's numbers beside those found here."""

from mpilsgd.reproduce.registry import (
    MissingData,
    Options,
    Reproduction,
    Result,
    Row,
    entries,
    named,
)

__all__ = ["MissingData", "Options", "Reproduction", "Result", "Row", "entries", "named"]
