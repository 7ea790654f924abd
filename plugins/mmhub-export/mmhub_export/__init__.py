"""mmhub models for other programs: `mmhub export`."""
