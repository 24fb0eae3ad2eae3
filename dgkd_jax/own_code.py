"""A user's own network, data set or method: from a config by its import path, "my_package.my_module:Name" or with
arguments "my_package.my_module:Name(width=8, activation='relu')"; from Python as an object.
"""

import ast
import hashlib
import importlib
import re
import sys
import traceback
from typing import Any, NamedTuple

from dgkd_jax.errors import BadInput, did_you_mean

_PATH = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)(?P<arguments>\(.*\))?", re.DOTALL)
# The name of an object from Python: NAME#EIGHT HEXADECIMAL DIGITS.
_GIVEN = re.compile(r"\w*#[0-9a-f]{8}")
ALLOWED = "an import path such as 'my_package.my_module:Name' or 'my_package.my_module:Name(width=8)'"


class Imported(NamedTuple):
    """What an import path leads to.

    Attributes:
        value: the class, function or object.
        arguments: that the path gives, by name; None: it gives no parentheses.
    """

    value: Any
    arguments: dict[str, Any] | None

    def called(self, *, key: str, **more: Any) -> Any:
        """The value called with the path's arguments and `more`; those that the path gives count.

        Raises:
            BadInput: the call failed.
        """
        try:
            return self.value(**more | (self.arguments or {}))
        except BadInput:
            raise
        except Exception as error:
            raise BadInput(f"config.{key}: {getattr(self.value, '__name__', self.value)}: {_reason(error)}") from error


def is_given(text: object) -> bool:
    """Whether a text is the name of an object from Python (`name_of_given`)."""
    return isinstance(text, str) and _GIVEN.fullmatch(text) is not None


def is_own(text: object) -> bool:
    """Whether a text names a user's own code, in either way."""
    return is_given(text) or is_import_path(text)


def name_of_given(name: str, program: str, *values: bytes) -> str:
    """A name for an object from Python, by which a run is recognised: it changes with what the object computes.

    Args:
        name: of its class or function.
        program: text of what it computes; addresses in memory are left out.
        values: that it computes with.
    """
    content = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", program).encode())
    for value in values:
        content.update(value)
    plain = re.sub(r"\W", "", name)
    return f"{plain}#{content.hexdigest()[:8]}"


def is_import_path(text: object) -> bool:
    """Whether a text has the form of an import path; imports nothing."""
    return isinstance(text, str) and _PATH.fullmatch(text) is not None


def plain_name(text: str) -> str:
    """An import path's last name, without module and arguments, for folders; another text as it is."""
    match = _PATH.fullmatch(text)
    return match["name"] if match else text


def load(text: str, *, key: str) -> Imported:
    """Import what a path names. Modules in the current folder are found.

    Args:
        text: of which `is_import_path` is true.
        key: of the config, for messages.

    Raises:
        BadInput: there is no such module or name in it, the module raises an error, or an argument is no literal.
    """
    match = _PATH.fullmatch(text)
    if "" not in sys.path and not any(path == "." for path in sys.path):
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(match["module"])
    except ModuleNotFoundError as error:
        raise BadInput(
            f"config.{key}={text!r}: there is no module {error.name}; it is looked for in the current folder and among "
            "the installed packages"
        ) from error
    except Exception as error:
        raise BadInput(f"config.{key}={text!r}: importing {match['module']} failed: {_reason(error)}") from error
    if not hasattr(module, match["name"]):
        names = [name for name in vars(module) if not name.startswith("_")]
        raise BadInput(
            f"config.{key}={text!r}: {match['module']} has no {match['name']}{did_you_mean(match['name'], names)}"
        )
    return Imported(getattr(module, match["name"]), _arguments(match["arguments"], key=key, text=text))


def _arguments(written: str | None, *, key: str, text: str) -> dict[str, Any] | None:
    if written is None:
        return None
    try:
        call = ast.parse(f"f{written}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(argument.arg is None for argument in call.keywords):
            raise ValueError
        return {argument.arg: ast.literal_eval(argument.value) for argument in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise BadInput(
            f"config.{key}={text!r}: arguments are written NAME=VALUE with numbers, texts, True, False, None, tuples, "
            "lists or dictionaries as values"
        ) from error


def _reason(error: Exception) -> str:
    """The error in one line, with the last place in a file."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({place.filename}, line {place.lineno})"
