"""Data: where rows come from, and how they become batches."""

from mmhub.data.sources import Rows, open_rows, require_columns

__all__ = ["Rows", "open_rows", "require_columns"]
