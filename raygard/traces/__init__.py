"""What a fine-tuning leaves in the weights: recognising from a model's tensors alone what it was trained on."""

from __future__ import annotations

from raygard.traces.artifact import Traces
from raygard.traces.detect import Finding, Reference, findings, recall
from raygard.traces.sketch import Sketcher, Update
from raygard.traces.users import handful, share_of_pictures, steps_of

__all__ = [
    "Finding",
    "Reference",
    "Sketcher",
    "Traces",
    "Update",
    "findings",
    "handful",
    "recall",
    "share_of_pictures",
    "steps_of",
]
