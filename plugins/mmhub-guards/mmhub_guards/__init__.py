"""Guards for mmhub models."""
