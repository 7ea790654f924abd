"""Low-rank fusion for mmhub. What the package offers is listed in `mmhub.toml`; nothing is imported from here."""
