"""What training a rule's parameters needs besides algebra: budgets of ranks, optimiser groups."""

from .allocator import RankAllocator, Schedule
from .callbacks import AllocateRanks
from .groups import lora_plus

__all__ = ["AllocateRanks", "RankAllocator", "Schedule", "lora_plus"]
