"""The training engine: one loop from a recipe to a publishable checkpoint, resumable at any step."""

from mmhub.engine.loop import TrainResult, train

__all__ = ["TrainResult", "train"]
