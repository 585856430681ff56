"""How a global batch is dealt to ranks and accumulation steps, also where it does not divide by their number.

Shares differ by at most one slot of each role, and each micro-batch weighs what it holds: the mean over all
micro-batches of weight x (mean loss of its samples) is the mean loss of the global batch, and so is its gradient.
"""

from __future__ import annotations


def share(slots: int, num_shares: int, index: int) -> range:
    """The slots of share `index`, of `slots` slots dealt in order to `num_shares` micro-batches."""
    return range(slots * index // num_shares, slots * (index + 1) // num_shares)


def weight(slots: int, num_shares: int, index: int) -> float:
    """What the mean loss of share `index` counts beside others; exactly 1 where the slots divide evenly."""
    return len(share(slots, num_shares, index)) * num_shares / slots


def largest_share(slots: int, num_shares: int) -> int:
    """Slots of the largest share."""
    return -(-slots // num_shares)
