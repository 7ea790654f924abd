"""The fusions the core ships: streams, concat, gated, attention. Others come from plugins under the same interface."""
