"""TRANSACTIONS: the arena, the journal inside the target, the flip, revert and reclaim."""
