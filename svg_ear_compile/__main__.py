"""`python -m svg_ear_compile` is the command `svg-ear`, also in a clone that is not installed."""

from svg_ear_compile.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
