"""A browser app for mmhub models: `mmhub ui`."""
