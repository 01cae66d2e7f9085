"""`python -m ostro` is `ostro`."""

from ostro.cli.main import main

if __name__ == "__main__":
    main()
