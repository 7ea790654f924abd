"""Task heads for mmhub: they turn the summary of a sample into an answer. Each is imported when it is first used."""
