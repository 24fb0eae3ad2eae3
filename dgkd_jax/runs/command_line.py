"""Parses the command line of a config; each mistake gives one line, instead of absl's and ml_collections' many."""

import ast
import contextlib
import glob
import importlib.util
import io
import os
import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from dgkd_jax.errors import BadInput, closest, did_you_mean
from dgkd_jax.methods import METHODS, names_of, sections_of
from dgkd_jax.methods.key import Key
from dgkd_jax.runs.default import KEYS, READ_BY_OPTIMIZERS

_HELP = re.compile(r"--?(help|helpshort|helpfull|h)")
_FILE = re.compile(r"--?config=(?P<file>.*)", re.DOTALL)
_OVERRIDE = re.compile(r"--?config\.(?P<key>[^=]+)(=(?P<value>.*))?", re.DOTALL)
_FLAG = re.compile(r"--?(?P<name>[\w.]+)(?P<value>=.*)?", re.DOTALL)
_BAD_VALUE = re.compile(r"flag --config\.(?P<key>[^=]+)=(?P<value>.*?): ", re.DOTALL)


def parse(argv: list[str], usage: str) -> list[str]:
    """Parse `argv` into absl's flags, including the config.

    Args:
        usage: text that --help prints before the keys and the available configs.

    Returns:
        The keys that `argv` sets.

    Raises:
        BadInput: no config, an unreadable config, an unknown flag or key, or a value of the wrong type.
        SystemExit: --help was asked for and printed.
    """
    if any(_HELP.fullmatch(argument) for argument in argv[1:]):
        topics = [argument for argument in argv[1:] if not argument.startswith("-")]
        print(_help(usage, topics))
        raise SystemExit(0)
    argv[:] = [argv[0], *map(_whole_number, _with_equals_sign(argv[1:]))]
    sys.argv[1:] = argv[1:]  # ml_collections reads the overrides from sys.argv
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a config may import others
    file = _check_file(argv)
    overrides = [match["key"] for argument in argv[1:] if (match := _OVERRIDE.fullmatch(argument))]
    for key in overrides:
        if key not in KEYS:
            raise BadInput(f"config.{key}: no such key{_nearest_key(key, argv, file)} (all keys: --help)")
    _check_flags(argv)
    try:
        left_over = flags.FLAGS(argv)[1:]
    except flags.Error as error:
        raise BadInput(_one_line(str(error))) from error
    except Exception as error:  # the config's own code may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise BadInput(f"{place.filename}, line {place.lineno}: {type(error).__name__}: {error}") from error
    if left_over:
        raise BadInput(f"unexpected argument {left_over[0]!r}; overrides are written --config.KEY=VALUE")
    return overrides


def config_of_file(argv: list[str]) -> ConfigDict:
    """The configuration of the file that `argv` names, without `argv`'s changes. `parse` has found it to be one."""
    given = [match["file"] for argument in argv[1:] if (match := _FILE.fullmatch(argument))][-1]
    path, _, argument = given.partition(":")
    with contextlib.redirect_stderr(io.StringIO()):  # what it says, it has said
        get_config = _module(path).get_config
        return get_config(argument) if argument else get_config()


def _module(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("configuration", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_read(overrides: Iterable[str], config: ConfigDict) -> None:
    """Refuse keys on the command line that the method or the optimizer does not read: they would have no effect.

    Args:
        overrides: keys, from `parse`.
        config: validated; several methods read the sections of each of them.

    Raises:
        BadInput: names the key, and the key that the method reads instead if there is one.
    """
    optimizer, method = config.optimizer.name, config.method
    for key in overrides:
        if optimizer not in READ_BY_OPTIMIZERS.get(key, (optimizer,)):
            raise BadInput(
                f"config.{key} would change nothing: config.optimizer.name={optimizer} does not read it, "
                f"{' and '.join(READ_BY_OPTIMIZERS[key])} would"
            )
    read = {section for name in names_of(config) if name in METHODS for section in sections_of(METHODS[name])}
    for key in overrides:
        section, _, name = key.partition(".")
        if section not in METHODS or section in read:
            continue
        instead = [f"{other}.{name}" for other in METHODS if other in read and f"{other}.{name}" in KEYS]
        way_out = f"method {method} reads config.{instead[0]}" if instead else f"method {method} does not read it"
        raise BadInput(f"config.{key} would change nothing: {way_out}. Or give --config.method={section}")


def _with_equals_sign(arguments: list[str]) -> list[str]:
    """`--config FILE` and `-config FILE` as `--config=FILE`."""
    joined, waiting = [], False
    for argument in arguments:
        if waiting:
            joined[-1] += f"={argument}"
        elif argument in ("--config", "-config"):
            argument = "--config"
        if not waiting:
            joined.append(argument)
        waiting = argument == "--config" and not waiting
    return joined


def _whole_number(argument: str) -> str:
    """A whole number in scientific notation as digits: `--config.epochs=1e1` becomes `--config.epochs=10`."""
    match = _OVERRIDE.fullmatch(argument)
    key = KEYS.get(match["key"]) if match else None
    if key is None or not match["value"] or not isinstance(key.default, int) or isinstance(key.default, bool):
        return argument
    try:
        number = float(match["value"])
    except ValueError:
        return argument
    return f"--config.{match['key']}={int(number)}" if number.is_integer() else argument


def _check_file(argv: list[str]) -> str:
    """The config's file, without the argument after the colon.

    Raises:
        BadInput: there is no such file, or it defines no config.
    """
    given = [match["file"] for argument in argv[1:] if (match := _FILE.fullmatch(argument))]
    if not given:
        raise BadInput("no --config=FILE given; try: python -m dgkd_jax.main --config=configs/mnist5k.py")
    path, _, argument = given[-1].partition(":")
    if os.path.isdir(path):
        raise BadInput(f"--config={given[-1]} is a folder; name one of its files, such as configs/mnist5k.py")
    if not os.path.isfile(path):
        by_stem = {Path(file).stem: file for file in _configurations()}
        near = closest(Path(path).stem, by_stem)
        hint = (
            f"; did you mean {by_stem[near[0]]!r}?" if near else " (python -m dgkd_jax.main --help lists those there)"
        )
        raise BadInput(f"--config={given[-1]}: no such file{hint}")
    functions = {node.name: node for node in _parsed(path).body if isinstance(node, ast.FunctionDef)}
    imported = "get_config" in Path(path).read_text()
    if "get_config" not in functions and not imported:
        raise BadInput(f"--config={path}: no configuration, it defines no get_config(); see configs/mnist5k.py")
    if argument and "get_config" in functions and not functions["get_config"].args.args:
        raise BadInput(f"--config={given[-1]}: {path} takes no argument; leave out :{argument}")
    return path


def _parsed(path: str) -> ast.Module:
    if not path.endswith(".py"):
        raise BadInput(f"--config={path}: a configuration is a Python file; see configs/mnist5k.py")
    try:
        return ast.parse(Path(path).read_text(encoding="utf-8"), filename=path)
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise BadInput(f"{path}, line {error.lineno}: {error.msg}: {line}") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise BadInput(f"--config={path}: no Python file, it holds bytes that are no text") from error
    except OSError as error:
        raise BadInput(f"--config={path}: cannot be read: {error.strerror}") from error


def _check_flags(argv: list[str]) -> None:
    """Refuse unknown flags; the most common one is a key without its `config.`."""
    for argument in argv[1:]:
        match = _FLAG.fullmatch(argument)
        if match and match["name"] not in flags.FLAGS and match["name"] in KEYS:
            raise BadInput(
                f"unknown flag {argument}: it is a key, so write --config.{match['name']}{match['value'] or ''}"
            )


def _nearest_key(key: str, argv: list[str], file: str) -> str:
    """`; did you mean …?` with the key that the method reads among those with the same last part."""
    method = _method(argv, file)
    read = sections_of(METHODS[method]) if method in METHODS else ()
    alike = [f"{section}.{key}" for section in read if f"{section}.{key}" in KEYS]
    return f"; did you mean {alike[0]!r}?" if alike else did_you_mean(key, KEYS)


def _method(argv: list[str], file: str) -> str | None:
    given = [
        match["value"] for argument in argv[1:] if (match := _OVERRIDE.fullmatch(argument)) and match["key"] == "method"
    ]
    if given:
        return given[-1]
    try:  # only for a message: errors in the file are reported when it is used
        return _module(file).get_config().method
    except Exception:
        return None


def _one_line(message: str) -> str:
    if bad := _BAD_VALUE.match(message):
        return f"config.{bad['key']}={bad['value']} is not allowed: {KEYS[bad['key']].rule.allowed}"
    if message.startswith("flag --config=") and "Traceback" in message:
        # The config itself failed: the user needs the place in the file and the reason, not ml_collections' text.
        place = re.findall(r'File "([^"]+)", line (\d+)', message)[-1]
        reason = message.strip().splitlines()[-1]
        if reason.startswith(("ValueError: ", "dgkd_jax.errors.BadInput: ")):
            return reason.split(": ", 1)[1]
        return f"{place[0]}, line {place[1]}: {reason}"
    return " ".join(message.split())


def _configurations() -> list[str]:
    """The files in configs/ that define a config."""
    files = sorted(glob.glob("configs/**/*.py", recursive=True))
    return [path for path in files if "def get_config(" in Path(path).read_text(errors="ignore")]


def _help(usage: str, topics: list[str]) -> str:
    """All keys, or those of the sections that are named: `--help dgkd optimizer`."""
    chosen = {name: key for name, key in KEYS.items() if not topics or name in topics or name.split(".")[0] in topics}
    if topics and not chosen:
        sections = dict.fromkeys(name.split(".")[0] for name in KEYS)
        return f"no key or section {', '.join(topics)}; there are {', '.join(sections)}"
    keys = "\n".join(_described(name, key) for name, key in chosen.items())
    if topics:
        return keys
    files = "\n".join(f"  {path}" for path in _configurations()) or "  (run from the repository's folder to see them)"
    return (
        f"{usage}\n\nConfigurations:\n{files}\n\n"
        f"Keys, their defaults, and what they may be (those of one section: --help dgkd):\n{keys}"
    )


def _described(name: str, key: Key) -> str:
    source = f"; {key.source}" if key.source else ""
    return f"  --config.{name}={key.default}\n      {key.meaning} ({key.rule.allowed}{source})"
