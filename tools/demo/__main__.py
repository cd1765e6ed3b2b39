"""`python -m gtcompile.tools.demo`, which is what `make demo` runs."""

from gtcompile.tools.demo.comparison import main

if __name__ == "__main__":
    main()
