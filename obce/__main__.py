"""`python -m obce` is `obce`."""

from obce.cli import main

if __name__ == "__main__":
    main()
