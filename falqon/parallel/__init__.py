"""Many devices: which strategies work, sharded layers, exact sums, sharded checkpoints."""
