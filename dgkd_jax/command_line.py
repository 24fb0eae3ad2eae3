"""The command line of a configuration, and its mistakes in one line each instead of absl's and ml_collections' many."""

import glob
import os
import re
import sys
import traceback

from absl import flags

from dgkd_jax.config import RULES, nearest
from dgkd_jax.errors import BadInput

_HELP = re.compile(r"--?(help|helpshort|helpfull|h)")
_FILE = re.compile(r"--?config=(?P<file>.*)", re.DOTALL)
_OVERRIDE = re.compile(r"--?config\.(?P<key>[^=]+)(=.*)?", re.DOTALL)
_BAD_VALUE = re.compile(r"flag --config\.(?P<key>[^=]+)=(?P<value>.*?): ", re.DOTALL)


def parse(argv: list[str], usage: str) -> None:
    """Parse `argv` into absl's flags, the configuration among them.

    Args:
        usage: what to print for --help, before the keys and the configurations that there are.

    Raises:
        BadInput: no configuration, one that cannot be read, an unknown flag or key, a value of the wrong type.
        SystemExit: --help was asked for and printed.
    """
    if any(_HELP.fullmatch(argument) for argument in argv[1:]):
        print(_help(usage))
        raise SystemExit(0)
    _check_file(argv)
    for argument in argv[1:]:
        override = _OVERRIDE.fullmatch(argument)
        if override and override["key"] not in RULES:
            key = override["key"]
            raise BadInput(f"config.{key}: no such key{nearest(key, RULES)} (all keys: configs/default.py)")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # configurations import configs.default
    try:
        left_over = flags.FLAGS(argv)[1:]
    except flags.Error as error:
        raise BadInput(_one_line(str(error))) from error
    except Exception as error:  # whatever the configuration's own code raises
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise BadInput(f"{place.filename}, line {place.lineno}: {type(error).__name__}: {error}") from error
    if left_over:
        raise BadInput(f"unexpected argument {left_over[0]!r}; overrides are written --config.KEY=VALUE")


def _check_file(argv: list[str]) -> None:
    given = [match["file"] for argument in argv[1:] if (match := _FILE.fullmatch(argument))]
    if not given:
        raise BadInput("no --config=FILE given; try: python -m dgkd_jax.main --config=configs/mnist5k.py")
    path = given[-1].split(":")[0]
    if not os.path.isfile(path):
        raise BadInput(f"--config={given[-1]}: no such file{nearest(path, _configurations())}")


def _one_line(message: str) -> str:
    if bad := _BAD_VALUE.match(message):
        return f"config.{bad['key']}={bad['value']} is not allowed: {RULES[bad['key']].allowed}"
    if message.startswith("flag --config=") and "Traceback" in message:
        # The configuration itself failed; the user needs the place in the file and the reason, not ml_collections.
        place = re.findall(r'File "([^"]+)", line (\d+)', message)[-1]
        reason = message.strip().splitlines()[-1]
        if reason.startswith(("ValueError: ", "dgkd_jax.errors.BadInput: ")):
            return reason.split(": ", 1)[1]
        return f"{place[0]}, line {place[1]}: {reason}"
    return " ".join(message.split())


def _configurations() -> list[str]:
    return sorted(path for path in glob.glob("configs/**/*.py", recursive=True) if "__init__" not in path)


def _help(usage: str) -> str:
    keys = "\n".join(f"  --config.{key}: {rule.allowed}" for key, rule in RULES.items())
    files = "\n".join(f"  {path}" for path in _configurations()) or "  (run from the repository's folder to see them)"
    return (
        f"{usage}\n\nConfigurations:\n{files}\n\n"
        f"Keys and what they may be (meaning, unit and default of each: configs/default.py):\n{keys}"
    )
