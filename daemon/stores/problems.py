"""Why a store could not be opened at all: said once, to whoever configured it."""

from __future__ import annotations

from pointsman.daemon.errors import PointsmanError


class StoreUrlError(PointsmanError):
    """The URL names no store that we have, or says something about it that we do not understand."""


class BackendMissingError(PointsmanError):
    """The package of a backend is not installed, or cannot be loaded here; the message has the line that mends it."""


class StoreUnusableError(PointsmanError):
    """What the URL names is there or not, but cannot be used: a file of another kind, a server that refuses us."""


def missing_package(backend: str, extra: str, detail: str, also: str = "") -> BackendMissingError:
    line = f"pip install 'pointsman[{extra}]'"
    return BackendMissingError(f"the {backend} store is not available ({detail}); install it with: {line}{also}")
