"""Tokenizers and text encoders for mmhub. Each module is imported when one of its components is first used."""
