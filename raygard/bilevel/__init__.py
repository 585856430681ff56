"""The bilevel algorithm on flat shards. Pure torch: no Ray, no DeepSpeed."""

from raygard.bilevel.optimizer import BilevelOptimizer
from raygard.bilevel.segments import Segment, ShardLayout

__all__ = ["BilevelOptimizer", "Segment", "ShardLayout"]
