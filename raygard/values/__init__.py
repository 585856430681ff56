"""Training the values of frozen tensors, in one process with torch alone (docs/values.md)."""

from raygard.values.batches import ValuesSource, general_rows
from raygard.values.loop import Plan, StepRecord, release_errors, train_values
from raygard.values.objective import NUM_BINS, ROLES, Objective

__all__ = [
    "NUM_BINS",
    "ROLES",
    "Objective",
    "Plan",
    "StepRecord",
    "ValuesSource",
    "general_rows",
    "release_errors",
    "train_values",
]
