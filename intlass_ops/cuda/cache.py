"""Cubins on disk: each is compiled once, by one process, and read by all the others.

One folder holds, for every key, an entry `<key>.cubin` and a lock file `<key>.lock`:

    entry    | magic 16 | key 32 | payload size 8 | sha256 of payload 32 | payload |

Whatever is wrong with an entry (cut off, altered, another key's, another user's) makes it as good
as missing: it is built again and replaced. Entries appear by os.replace, so a reader sees all of
one or none. Locks are flock's: the kernel drops them when their holder dies. A folder that cannot
be used costs one warning and the sharing, nothing else. It may be deleted at any time.

What the payloads are and what goes into a key is jit.py's business.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import stat
import struct
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_HEADER = struct.Struct("<16s32sQ32s")
_MAGIC = b"intlass cubin 1\n"
_KEY = re.compile(r"[0-9a-f]{64}")
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
# A peer that takes longer than this over one kernel is stuck: compile it ourselves.
_LOCK_PATIENCE_S = 600.0
_LOCK_POLL_S = 0.02

_thread_locks: dict[tuple[Path, str], threading.Lock] = {}
_thread_locks_guard = threading.Lock()
_open_lock_files: set[int] = set()


def default_directory() -> Path:
    """$INTLASS_CACHE_DIR, else intlass_ops in the user's cache folder."""
    chosen = os.environ.get("INTLASS_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser().absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = xdg if xdg.is_absolute() else Path(os.path.expanduser("~/.cache"))
    return base / "intlass_ops"


class CubinCache:
    """Payloads by key (64 hex digits) in ``directory``; in memory where that cannot be written."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._memory: dict[str, bytes] = {}
        self._warned = False

    def get_or_build(self, key: str, build: Callable[[], bytes]) -> tuple[bytes, bool]:
        """The payload of ``key``, and whether this call had to build it.

        Of all threads and processes asking at once, one builds; the others wait for its entry. If
        ``build`` raises, so does this call, and the next in line tries.
        """
        payload = self._find(key)
        if payload is not None:
            return payload, False
        with self._thread_lock(key), self._process_lock(key):
            payload = self._find(key)
            if payload is not None:
                return payload, False
            payload = build()
            self._store(key, payload)
            return payload, True

    def entry_path(self, key: str) -> Path:
        return self.directory / f"{key}.cubin"

    def entries(self) -> list[Path]:
        """The files of all entries, sound or not."""
        return sorted(self.directory.glob("*.cubin"))

    def is_sound(self, entry: Path) -> bool:
        """Whether ``entry`` would be read, rather than built again."""
        return bool(_KEY.fullmatch(entry.stem)) and _read_entry(entry, entry.stem) is not None

    def _find(self, key: str) -> bytes | None:
        payload = self._memory.get(key)
        if payload is None and self._is_trusted():
            payload = _read_entry(self.entry_path(key), key)
        return payload

    def _store(self, key: str, payload: bytes) -> None:
        digest = hashlib.sha256(payload).digest()
        header = _HEADER.pack(_MAGIC, bytes.fromhex(key), len(payload), digest)
        if self._is_trusted():
            try:
                _write_atomically(self.entry_path(key), header + payload)
            except OSError as error:
                self._warn(str(error))
            else:
                return
        self._memory[key] = payload

    def _is_trusted(self) -> bool:
        """Whether the folder is there (made if need be) and ours alone to write."""
        problem = _prepare(self.directory)
        if problem is not None:
            self._warn(problem)
        return problem is None

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"compiled kernels are kept in memory only, every process compiles its own: "
                f"{self.directory} cannot hold them ({problem}). Set INTLASS_CACHE_DIR to a folder "
                f"of your own with room in it.",
                RuntimeWarning,
                stacklevel=2,
            )

    @contextmanager
    def _thread_lock(self, key: str) -> Iterator[None]:
        with _thread_locks_guard:
            lock = _thread_locks.setdefault((self.directory, key), threading.Lock())
        with lock:
            yield

    @contextmanager
    def _process_lock(self, key: str) -> Iterator[None]:
        """Held alone among processes; not held at all where the folder or its kind has no locks."""
        descriptor = None
        if self._is_trusted():
            with suppress(OSError):  # read-only or full: _store will say so
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                descriptor = os.open(self.directory / f"{key}.lock", flags, 0o600)
        if descriptor is None:
            yield
            return
        _open_lock_files.add(descriptor)
        try:
            _wait_for(descriptor)
            yield
        finally:
            _open_lock_files.discard(descriptor)
            # A child forked meanwhile may share the file: closing ours alone would keep the lock.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _wait_for(descriptor: int) -> None:
    give_up = time.monotonic() + _LOCK_PATIENCE_S
    while time.monotonic() < give_up:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_POLL_S)
        except OSError:  # a filesystem without locks: the worst is that two build the same entry
            return
        else:
            return


def _prepare(directory: Path) -> str | None:
    """Make the folder if need be. Returns why it cannot be used, or None."""
    if not directory.is_absolute():
        return "there is no home folder"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
    except OSError as error:
        return str(error)
    return _distrust(found)


def _distrust(found: os.stat_result) -> str | None:
    """Why a file or folder may hold another user's bytes (they would run on this one's GPU)."""
    if found.st_uid != os.geteuid():
        return f"it belongs to user {found.st_uid}, this is user {os.geteuid()}"
    if found.st_mode & _OTHERS_MAY_WRITE:
        return f"other users may write to it (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def _read_entry(path: Path, key: str) -> bytes | None:
    try:
        # Non-blocking, so that a pipe put in an entry's place is refused and not waited for.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        with open(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or _distrust(found):
                return None
            entry = file.read()
    except OSError:
        return None
    if len(entry) < _HEADER.size:
        return None
    magic, entry_key, size, digest = _HEADER.unpack_from(entry)
    payload = entry[_HEADER.size :]
    is_sound = (
        magic == _MAGIC
        and entry_key == bytes.fromhex(key)
        and size == len(payload)
        and digest == hashlib.sha256(payload).digest()
    )
    return payload if is_sound else None


def _write_atomically(path: Path, content: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with open(descriptor, "wb") as file:  # mkstemp made it 0600
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _forget_locks_of_parent() -> None:
    """In a forked child: no thread of the parent runs here that could release what it held."""
    global _thread_locks_guard
    _thread_locks_guard = threading.Lock()
    _thread_locks.clear()
    for descriptor in _open_lock_files:
        with suppress(OSError):
            os.close(descriptor)
    _open_lock_files.clear()


os.register_at_fork(after_in_child=_forget_locks_of_parent)
