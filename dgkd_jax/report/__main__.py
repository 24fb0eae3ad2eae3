"""Writes a report page about runs: python -m dgkd_jax.report WORKDIR… [--output=DIR]

  WORKDIR     a run's folder, or a folder with several runs (runs/mnist5k, runs/study/NAME)
  --output    folder for index.html and the figures as PNG; default: report in the first WORKDIR

The page is one file and loads nothing, so it can be sent to others. Runs that differ only in their seed form a group;
the folder `teacher` is a teacher's own run. Finished and unfinished runs can be read.
"""

import argparse
import sys

from dgkd_jax.errors import ArgumentParser, exit_code_of
from dgkd_jax.report.compose import write


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = ArgumentParser(
        prog="python -m dgkd_jax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        example="python -m dgkd_jax.report runs/mnist5k",
    )
    parser.add_argument("workdir", nargs="+", metavar="WORKDIR", help="of a run, or a folder with several beneath it")
    parser.add_argument("--output", metavar="DIR", help="default: WORKDIR/report of the first")

    def work() -> None:
        options = parser.parse_args(arguments)
        print(f"the report is in {write(options.workdir, options.output)}")

    return exit_code_of(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
