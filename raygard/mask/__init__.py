"""The product: which parameter tensors of a denoiser are frozen, as a named, hashed, checkable artifact."""

from raygard.mask.adapters import AdapterReport, audit_lora, lora_targets
from raygard.mask.artifact import FreezeMask
from raygard.mask.audit import AuditReport, audit_states
from raygard.mask.signature import SignatureError, make_keys, sign_mask
from raygard.mask.soft import select_frozen, shift_to_budget, soft_mask

__all__ = [
    "AdapterReport",
    "AuditReport",
    "FreezeMask",
    "SignatureError",
    "audit_lora",
    "audit_states",
    "lora_targets",
    "make_keys",
    "select_frozen",
    "shift_to_budget",
    "sign_mask",
    "soft_mask",
]
