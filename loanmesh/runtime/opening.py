"""What goes wrong when a database is opened, in one line that names the setting."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator

import asyncpg
from alembic.util import CommandError
from sqlalchemy.exc import SQLAlchemyError

from loanmesh.runtime.errors import DependencyDown
from loanmesh.runtime.migrations import OldTables
from loanmesh.runtime.setting_rules import NotReachable, WrongSetting


@contextlib.contextmanager
def opening(setting: str, url: str) -> Iterator[None]:
    """Around the migration and opening of the database that `setting` names.

    Raises NotReachable where it may come right by itself (a server that is down, a file that is locked, tables that
    wait for their migration), WrongSetting where it will not. The url, which may hold a password, is never shown.
    """
    is_file = url.startswith("sqlite:")
    try:
        yield
    except OldTables as error:
        raise NotReachable(setting, str(error)) from error
    except (OSError, sqlite3.Error, SQLAlchemyError, CommandError, DependencyDown, *_POSTGRES) as error:
        cause = _cause(error)
        text = f"{'the file' if is_file else 'the database'} cannot be opened: {_words(cause)}"
        away = isinstance(cause, _NOT_NOW)
        if is_file:
            away = isinstance(cause, sqlite3.OperationalError) and "locked" in str(cause)
        if away or (isinstance(cause, OSError) and not is_file):
            raise NotReachable(setting, text) from error
        raise WrongSetting(setting, text) from error


_NOT_NOW = (
    DependencyDown,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.LockNotAvailableError,
)
_POSTGRES = (asyncpg.PostgresError, asyncpg.InterfaceError)
_SAID = (OSError, sqlite3.Error, CommandError, DependencyDown, *_POSTGRES)


def _cause(error: BaseException) -> BaseException:
    """What the driver said, below what SQLAlchemy and its adapter wrap around it."""
    while not isinstance(error, _SAID) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return (str(error) or type(error).__name__).splitlines()[0]
