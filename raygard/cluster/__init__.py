"""Everything that imports Ray or DeepSpeed: workers, sharded engine, sessions, distributed evaluation."""
