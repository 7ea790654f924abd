"""A folder with one self-contained page on an evaluation, the numbers behind it, and the confusion matrix as a picture.

Nothing here measures anything: the page shows what `mmhub.evaluation` found and what it answered to the worst rows.
"""

from __future__ import annotations

from mmhub.lazy import lazy

__getattr__, __dir__ = lazy("mmhub.report", {"check_report": "folder", "write_report": "folder"})
