"""A second pass that is the same function as the first one, and what it must not change. Knows torch only."""

from sam_lightning.replay.replay import Replay

__all__ = ["Replay"]
