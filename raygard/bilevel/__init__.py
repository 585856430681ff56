"""The bilevel algorithm on flat shards. Pure torch: no Ray, no DeepSpeed."""

from raygard.bilevel.optimizer import BilevelOptimizer
from raygard.bilevel.segments import Segment, ShardLayout
from raygard.bilevel.streamed import StreamedEngine

__all__ = ["BilevelOptimizer", "Segment", "ShardLayout", "StreamedEngine"]
