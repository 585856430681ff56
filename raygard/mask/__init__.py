"""The product: which parameter tensors of a denoiser are frozen, as a named, hashed, checkable artifact."""

from raygard.mask.artifact import FreezeMask
from raygard.mask.audit import AuditReport, audit_states
from raygard.mask.soft import select_frozen, shift_to_budget, soft_mask

__all__ = ["AuditReport", "FreezeMask", "audit_states", "select_frozen", "shift_to_budget", "soft_mask"]
