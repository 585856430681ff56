"""Training the values of frozen tensors, in one process with torch alone (docs/values.md)."""

from raygard.values.batches import ValuesSource, general_rows
from raygard.values.loop import Plan, StepRecord, release_errors, train_values
from raygard.values.objective import GENERAL, NUM_BINS, ROLES, Objective
from raygard.values.taught import TaughtLoss

__all__ = [
    "GENERAL",
    "NUM_BINS",
    "ROLES",
    "Objective",
    "Plan",
    "StepRecord",
    "TaughtLoss",
    "ValuesSource",
    "general_rows",
    "release_errors",
    "train_values",
]
