"""Where a study is stored: one address, which any number of workers can open without races.

sqlite:///optuna.db                        a file, for workers on one machine
journal:////shared/study.log               Optuna's journal, for workers that share a file system
postgresql://user:password@host/database   a server, for workers on any machine that reaches it (extra `postgres`)

As in SQLAlchemy, the path after three slashes is relative; four slashes make it absolute.
"""

from __future__ import annotations

import importlib.util
import shlex
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

SERVER_HINT = "; start that server or correct the address; without a server, sqlite:///optuna.db works on one machine"

BUSY_SECONDS = 60  # seconds SQLite waits for another worker's transaction; the default of 5 is too short on a busy disk
CONNECT_SECONDS = 10  # seconds to wait for a server's answer, unless the address sets connect_timeout
LOCK_NUMBER = int.from_bytes(b"morphtra", "big")  # of the advisory lock in the study's database

# If a worker's machine disappears, a server keeps its connection and lock until the network stack gives up, by default
# after two hours.
KEEPALIVE = "SET tcp_keepalives_idle = 30; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3"


def open_storage(url: str) -> BaseStorage:
    """Open Optuna's storage at an address; one worker at a time creates the file or tables that are missing.

    Raises:
        UserError: if the kind of address is unknown, the driver, directory or server is missing, or the server refuses.
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
    """Let one process at a time, on any machine, use this address; the lock ends with the process that holds it.

    Do not nest it: `open_storage` takes the same lock.

    Raises:
        UserError: like `open_storage`.
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
    """The address without its password, for messages; raises `UserError` if `open_storage` cannot take it."""
    return _shown(_parse(url))


def dashboard(url: str) -> str:
    """The command that shows a study in the browser, on this host alone; a password is left to PGPASSWORD.

    Raises:
        UserError: if `open_storage` cannot take the address.
    """
    from sqlalchemy.engine import URL

    address = _parse(url)
    storage = url
    if address.drivername == "journal":
        storage = str(_path(address))
    elif address.drivername not in FILES:
        place = {name: value for name, value in address.query.items() if name in ("host", "port")}  # of a socket
        kept = (address.username, None, address.host, address.port, address.database)
        storage = URL.create(address.drivername, *kept, query=place).render_as_string()
    installed = importlib.util.find_spec("optuna_dashboard") is not None
    first = "" if installed else "pip install optuna-dashboard; "
    return f"{first}optuna-dashboard {shlex.quote(storage)}  (then http://127.0.0.1:8080)"


def _parse(url: str) -> URL:
    """The parts of an address, checked as far as possible without opening it."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    scheme = url.partition(":")[0]
    shown = f"{scheme}:..." if ":" in url else url  # the rest may contain a password
    if url.count("@") > 1:
        raise UserError(f"{KEY}={shown}: has more than one @; write %40 for an @ in the user name or password")
    try:
        address = make_url(url)
    except (ArgumentError, ValueError):  # `from None`: the cause would show the password
        raise UserError(f"{KEY}={shown}: not an address of a study; {WORKS}") from None
    if address.drivername in FILES:
        _check_path(address)
    elif address.drivername == POSTGRES:
        address = address.set(drivername=f"{POSTGRES}+psycopg")
    else:
        raise UserError(f"{KEY}={shown}: cannot store a study; {WORKS}")
    return address


def _check_path(address: URL) -> None:
    scheme, name = address.drivername, address.database
    if address.host or not name or name == ":memory:":
        wanted = f"{scheme}:///study (relative) or {scheme}:////shared/study (absolute) works"
        raise UserError(f"{KEY}={_shown(address)}: does not name a file; {wanted}")
    directory = Path(name).parent
    if not directory.is_dir():
        absolute = Path("/", name)
        hint = f", or write {scheme}:///{absolute} for {absolute}" if absolute.parent.is_dir() else ""
        raise UserError(f"{KEY}={_shown(address)}: there is no directory {directory}; make it{hint}")


def _path(address: URL) -> Path:
    assert address.database is not None  # by _check_path
    return Path(address.database)


def _shown(address: URL) -> str:
    """The address without its password, which may also be among the options after the question mark."""
    plain = address.set(drivername=address.get_backend_name(), query={})
    return plain.render_as_string(hide_password=True)


def _engine_options(address: URL) -> dict[str, Any]:
    if address.drivername in FILES:
        return {"connect_args": {"timeout": BUSY_SECONDS}}
    timeout = {} if "connect_timeout" in address.query else {"connect_timeout": CONNECT_SECONDS}
    # An epoch can last long enough for a firewall to drop an idle connection, so test each one before use.
    return {"connect_args": timeout, "pool_pre_ping": True}


@contextmanager
def _explained(address: URL) -> Iterator[None]:
    """Turn whatever opening an address raises into a one-line `UserError`."""
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
        said = error.__cause__ or error  # the driver's own message is the clearest
        reason, cause = f"{said}{'' if address.drivername in FILES else SERVER_HINT}", error
    except (RuntimeError, ValueError) as error:  # tables of another Optuna version; not a journal
        reason, cause = str(error), error
    raise UserError(f"{KEY}={_shown(address)}: {' '.join(reason.split())}") from cause


@contextmanager
def _advisory_lock(address: URL) -> Iterator[None]:
    """A PostgreSQL advisory lock, held for as long as its own connection lasts."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.pool import NullPool

    engine = create_engine(address, poolclass=NullPool, isolation_level="AUTOCOMMIT", **_engine_options(address))
    with engine.connect() as connection:
        connection.execute(text(KEEPALIVE))
        connection.execute(text("SELECT pg_advisory_lock(:number)"), {"number": LOCK_NUMBER})
        yield
