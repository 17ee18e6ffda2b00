"""Where a study is kept: one address, opened without races by any number of workers.

sqlite:///optuna.db                        a file, for workers on one machine
journal:////shared/study.log               Optuna's journal, for workers that share a file system
postgresql://user:password@host/database   a server, for workers on any machine that reaches it (extra `postgres`)

Paths are as SQLAlchemy has them: behind three slashes a relative one, behind four an absolute one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphtrain.errors import UserError
from morphtrain.files import file_lock

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from sqlalchemy.engine import URL

KEY = "hydra.sweeper.storage"
FILES = ("sqlite", "journal")
POSTGRES = "postgresql"
WORKS = "sqlite:///optuna.db, postgresql://user:password@host/database or journal:////shared/study.log works"

SERVER_HINT = "; start that server or mend the address; without a server, sqlite:///optuna.db works on one machine"

BUSY_SECONDS = 60  # how long SQLite waits for another worker's transaction; its default of 5 is short on a busy disk
CONNECT_SECONDS = 10  # how long to wait for a server's answer, where the address has no connect_timeout of its own
LOCK_NUMBER = int.from_bytes(b"morphtra", "big")  # of the advisory lock, in the database that the study is in

# A server takes a worker whose machine went away for alive, lock and all, until its network stack gives up: two hours.
KEEPALIVE = "SET tcp_keepalives_idle = 30; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3"


def open_storage(url: str) -> BaseStorage:
    """Optuna's storage at an address; what it needs there is made, by one worker at a time.

    Raises:
        UserError: for another kind of address, a driver, directory or server that is not there, or one that refuses.
    """
    address = _parse(url)
    with exclusive(url), _explained(address):
        if address.drivername == "journal":
            from morphtrain.sweep.journal import open_journal

            return open_journal(_path(address))
        from optuna.storages import RDBStorage

        return RDBStorage(address.render_as_string(hide_password=False), engine_kwargs=_engine_options(address))


@contextmanager
def exclusive(url: str) -> Iterator[None]:
    """One process at a time, of all that open this address on whatever machine; the lock goes with its holder.

    It is not to be taken twice, and `open_storage` takes it.

    Raises:
        UserError: as `open_storage`.
    """
    address = _parse(url)
    with ExitStack() as stack:
        with _explained(address):
            if address.drivername in FILES:
                stack.enter_context(file_lock(Path(f"{_path(address)}.exclusive")))
            else:
                stack.enter_context(_advisory_lock(address))
        yield


def without_password(url: str) -> str:
    """The address as it may be shown; raises `UserError` as `open_storage` does."""
    return _shown(_parse(url))


def _parse(url: str) -> URL:
    """The parts of an address that can be opened, as far as can be told without trying."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    scheme = url.partition(":")[0]
    shown = f"{scheme}:..." if ":" in url else url  # what follows may be a password
    if url.count("@") > 1:
        raise UserError(f"{KEY}={shown}: holds more than one @; write %40 for those in user name and password")
    try:
        address = make_url(url)
    except (ArgumentError, ValueError):  # the cause would show the address
        raise UserError(f"{KEY}={shown}: not an address of a study; {WORKS}") from None
    if address.drivername in FILES:
        _check_path(address)
    elif address.drivername == POSTGRES:
        address = address.set(drivername=f"{POSTGRES}+psycopg")
    else:
        raise UserError(f"{KEY}={shown}: not a place to keep a study; {WORKS}")
    return address


def _check_path(address: URL) -> None:
    scheme, name = address.drivername, address.database
    if address.host or not name or name == ":memory:":
        wanted = f"{scheme}:///study (relative) or {scheme}:////shared/study (absolute) works"
        raise UserError(f"{KEY}={_shown(address)}: names no file; {wanted}")
    directory = Path(name).parent
    if not directory.is_dir():
        absolute = Path("/", name)
        hint = f", or write {scheme}:///{absolute} for {absolute}" if absolute.parent.is_dir() else ""
        raise UserError(f"{KEY}={_shown(address)}: there is no directory {directory}; make it{hint}")


def _path(address: URL) -> Path:
    assert address.database is not None  # _check_path
    return Path(address.database)


def _shown(address: URL) -> str:
    """The address without its password, which may also be among the options behind the question mark."""
    plain = address.set(drivername=address.get_backend_name(), query={})
    return plain.render_as_string(hide_password=True)


def _engine_options(address: URL) -> dict[str, Any]:
    if address.drivername in FILES:
        return {"connect_args": {"timeout": BUSY_SECONDS}}
    timeout = {} if "connect_timeout" in address.query else {"connect_timeout": CONNECT_SECONDS}
    # Between two epochs there is time for a firewall to forget a connection: look before using one.
    return {"connect_args": timeout, "pool_pre_ping": True}


@contextmanager
def _explained(address: URL) -> Iterator[None]:
    """What opening an address raises, as a `UserError` in a line."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    cause: Exception
    try:
        yield
        return
    except ImportError as error:
        reason, cause = "needs the driver psycopg: pip install 'morphtrain[postgres]'", error
    except OSError as error:
        reason, cause = f"{error.filename}: {error.strerror}", error
    except (SQLAlchemyError, StorageInternalError) as error:
        said = error.__cause__ or error  # the driver's own words
        reason, cause = f"{said}{'' if address.drivername in FILES else SERVER_HINT}", error
    except (RuntimeError, ValueError) as error:  # tables of another version of Optuna; no journal
        reason, cause = str(error), error
    raise UserError(f"{KEY}={_shown(address)}: {' '.join(reason.split())}") from cause


@contextmanager
def _advisory_lock(address: URL) -> Iterator[None]:
    """A lock of PostgreSQL's, for as long as a connection of its own lasts."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.pool import NullPool

    engine = create_engine(address, poolclass=NullPool, isolation_level="AUTOCOMMIT", **_engine_options(address))
    with engine.connect() as connection:
        connection.execute(text(KEEPALIVE))
        connection.execute(text("SELECT pg_advisory_lock(:number)"), {"number": LOCK_NUMBER})
        yield
