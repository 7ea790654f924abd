"""Uploads by the Xet protocol, which huggingface_hub uses for every large file.

`formats` reads what clients send, `area` keeps a repository's chunks, `routes` answers the requests.
"""

from mmhub_hubserver.xet.area import sweep

__all__ = ["sweep"]
