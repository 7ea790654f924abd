"""Publish to and load from the Hugging Face Hub, or any server that speaks its protocol (`HF_ENDPOINT`)."""

from mmhub.hub.pull import load, pull
from mmhub.hub.push import push

__all__ = ["load", "pull", "push"]
