"""Errors written for the person who meets them: the argument, the value got, the value expected."""

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType


class InvalidArgument(ValueError):
    """A value the user gave cannot be used."""


class MissingExtra(ImportError):
    """An optional package is not installed."""


class Failed(RuntimeError):
    """Something outside the program went wrong; the message says what and what to do."""


def require(condition: bool, argument: str, got: object, expected: str | Callable[[], str]) -> None:
    """Raise ``InvalidArgument("argument: got ..., expected ...")``, a ValueError, unless ``condition`` holds.

    ``expected`` as a function is asked only then: in compiled code a text with a size in it ties the graph to the size.
    """
    if not condition:
        text = expected if isinstance(expected, str) else expected()
        raise InvalidArgument(f"{argument}: got {_shown(got)}, expected {text}")


def _shown(got: object) -> str:
    """The value, as far as a person reads it."""
    text = " ".join(line.strip() for line in repr(got).splitlines())
    return text if len(text) <= 300 else f"{text[:300]}..."


def installed(module: str) -> bool:
    """Whether ``module`` is there to be imported, without importing it (but for the packages that it is in)."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def optional_import(module: str, extra: str) -> ModuleType:
    """Import ``module``, or say in one line which extra of rocket-fast brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{module} is needed here and could not be imported ({error}); install it with: "
            f"pip install 'rocket-fast[{extra}]'"
        ) from error
