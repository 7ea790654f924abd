"""The `mmhub` command. One module per command, imported only when it runs."""
