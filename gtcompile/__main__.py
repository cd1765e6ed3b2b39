"""`python -m gtcompile`, the same as the `gtcompile` command."""

from gtcompile.cli import main

if __name__ == "__main__":
    main()
