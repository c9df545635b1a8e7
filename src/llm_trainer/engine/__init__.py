"""How a step is executed: the only room with ranks, sharding and precision."""
