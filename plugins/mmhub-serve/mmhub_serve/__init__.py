"""HTTP inference for mmhub models: `mmhub serve`."""
