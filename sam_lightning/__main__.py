"""`python -m sam_lightning`, the same as the command `sam-lightning`."""

from sam_lightning.cli import main

if __name__ == "__main__":
    main()
