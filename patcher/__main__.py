"""`python -m patcher`."""

from patcher.cli.main import main

if __name__ == "__main__":
    main()
