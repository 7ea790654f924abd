"""The fusions the core ships: streams, concat, gated, attention, interleave. Others come from plugins."""
