"""Training: rank budgets and optimiser groups."""

from peftsurgery.training.allocator import RankAllocator, Schedule
from peftsurgery.training.callbacks import AllocateRanks
from peftsurgery.training.groups import lora_plus

__all__ = ["AllocateRanks", "RankAllocator", "Schedule", "lora_plus"]
