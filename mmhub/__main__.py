"""`python -m mmhub`, which is also what torchrun starts."""

from mmhub.cli.main import main

if __name__ == "__main__":
    main()
