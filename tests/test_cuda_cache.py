"""The disk cache of compiled kernels: what it trusts, what it survives, who builds and who waits.

The payloads here are any bytes; compiling through the cache is in test_cuda_compiler.py.
"""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from intlass_ops.cuda import cache as cache_module
from intlass_ops.cuda.cache import CubinCache, default_directory

KEY = hashlib.sha256(b"a kernel").hexdigest()
OTHER_KEY = hashlib.sha256(b"another kernel").hexdigest()


@pytest.fixture
def cache(tmp_path: Path) -> CubinCache:
    return CubinCache(tmp_path / "cache")


def never() -> bytes:
    raise AssertionError("built again")


def test_an_entry_is_built_once_and_read_by_others(cache: CubinCache) -> None:
    assert cache.get_or_build(KEY, lambda: b"image") == (b"image", True)
    assert CubinCache(cache.directory).get_or_build(KEY, never) == (b"image", False)


def test_files_are_private(cache: CubinCache) -> None:
    cache.get_or_build(KEY, lambda: b"image")
    assert cache.directory.stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in cache.directory.iterdir()}
    assert modes == {f"{KEY}.cubin": 0o600, f"{KEY}.lock": 0o600}


def _cut(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes()[:-1])


def _cut_in_header(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes()[:20])


def _empty(entry: Path) -> None:
    entry.write_bytes(b"")


def _alter(entry: Path) -> None:
    content = bytearray(entry.read_bytes())
    content[-3] ^= 1
    entry.write_bytes(content)


def _append(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes() + b"\0")


def _exchange_for_another_keys(entry: Path) -> None:
    CubinCache(entry.parent).get_or_build(OTHER_KEY, lambda: b"other")
    entry.write_bytes((entry.parent / f"{OTHER_KEY}.cubin").read_bytes())


def _exchange_for_another_programs(entry: Path) -> None:
    entry.write_bytes(b"\x7fELF" + bytes(500))


def _let_group_write(entry: Path) -> None:
    entry.chmod(0o620)


def _let_world_write(entry: Path) -> None:
    entry.chmod(0o602)


def _exchange_for_a_link(entry: Path) -> None:
    entry.rename(entry.with_suffix(".moved"))
    entry.symlink_to(entry.with_suffix(".moved"))


def _exchange_for_a_pipe(entry: Path) -> None:
    entry.unlink()
    os.mkfifo(entry, 0o600)


def _give_away(entry: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")
    os.chown(entry, 12345, -1)


@pytest.mark.parametrize(
    "spoil",
    [
        _cut,
        _cut_in_header,
        _empty,
        _alter,
        _append,
        _exchange_for_another_keys,
        _exchange_for_another_programs,
        _let_group_write,
        _let_world_write,
        _exchange_for_a_link,
        _exchange_for_a_pipe,
        _give_away,
    ],
)
def test_a_spoilt_entry_is_built_again(cache: CubinCache, spoil: Callable[[Path], None]) -> None:
    cache.get_or_build(KEY, lambda: b"image")
    spoil(cache.entry_path(KEY))
    assert cache.get_or_build(KEY, lambda: b"rebuilt") == (b"rebuilt", True)
    assert CubinCache(cache.directory).get_or_build(KEY, never) == (b"rebuilt", False)


def _of_all(warned: list[warnings.WarningMessage]) -> str:
    assert len(warned) == 1, [str(w.message) for w in warned]
    return str(warned[0].message)


def _use_twice(cache: CubinCache) -> list[warnings.WarningMessage]:
    """Two kernels, each asked for twice: built once each, kept in memory."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for key in (KEY, OTHER_KEY):
            assert cache.get_or_build(key, key.encode) == (key.encode(), True)
            assert cache.get_or_build(key, never) == (key.encode(), False)
    return warned


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_folder_that_takes_no_files_costs_one_warning(
    cache: CubinCache, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    # Tests may run as root, whom modes do not stop: refuse to create files as the system would.
    cache.directory.mkdir(mode=0o700)
    real_open = os.open

    def refusing_open(path: object, flags: int, *args: object, **kwargs: object) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(cache.directory)):
            raise OSError(code, os.strerror(code), str(path))
        return real_open(path, flags, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refusing_open)
    message = _of_all(_use_twice(cache))
    assert os.strerror(code) in message
    assert "INTLASS_CACHE_DIR" in message


def test_a_read_only_folder_still_serves_its_entries(
    cache: CubinCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.get_or_build(KEY, lambda: b"image")

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cache_module, "_write_atomically", refuse)
    assert CubinCache(cache.directory).get_or_build(KEY, never) == (b"image", False)


def test_a_disk_full_halfway_leaves_nothing_behind(
    cache: CubinCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    assert "No space left" in _of_all(_use_twice(cache))
    assert {path.suffix for path in cache.directory.iterdir()} == {".lock"}


def test_a_folder_below_a_file_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "Not a directory" in _of_all(_use_twice(CubinCache(tmp_path / "file" / "cache")))


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_others_may_write_to_is_not_used(cache: CubinCache, mode: int) -> None:
    cache.get_or_build(KEY, lambda: b"image from others")
    cache.directory.chmod(mode)
    message = _of_all(_use_twice(CubinCache(cache.directory)))
    assert f"{mode:o}" in message


def test_a_folder_of_another_user_is_not_used(cache: CubinCache) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder to another user")
    cache.directory.mkdir(mode=0o700)
    os.chown(cache.directory, 12345, -1)
    assert "belongs to user 12345" in _of_all(_use_twice(cache))


def test_no_home_folder_costs_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("INTLASS_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert "no home folder" in _of_all(_use_twice(CubinCache(default_directory())))


def test_the_folder_is_chosen_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("INTLASS_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_directory() == tmp_path / "home" / ".cache" / "intlass_ops"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_directory() == tmp_path / "xdg" / "intlass_ops"
    monkeypatch.setenv("INTLASS_CACHE_DIR", str(tmp_path / "chosen"))
    assert default_directory() == tmp_path / "chosen"


def test_a_folder_deleted_meanwhile_is_made_again(cache: CubinCache) -> None:
    cache.get_or_build(KEY, lambda: b"image")
    for path in cache.directory.iterdir():
        path.unlink()
    cache.directory.rmdir()
    assert cache.get_or_build(KEY, lambda: b"rebuilt") == (b"rebuilt", True)
    assert cache.entry_path(KEY).exists()


def test_a_failed_build_leaves_the_next_one_to_try(cache: CubinCache) -> None:
    with pytest.raises(AssertionError, match="built again"):
        cache.get_or_build(KEY, never)
    assert cache.get_or_build(KEY, lambda: b"image") == (b"image", True)


@pytest.mark.parametrize("on_disk", [True, False])
def test_threads_wait_for_the_one_that_builds(tmp_path: Path, on_disk: bool) -> None:
    (tmp_path / "file").write_text("")
    cache = CubinCache(tmp_path / ("cache" if on_disk else "file/cache"))
    builds: list[int] = []
    results: list[tuple[bytes, bool]] = []

    def build() -> bytes:
        builds.append(1)
        time.sleep(0.1)
        return b"image"

    threads = [
        threading.Thread(target=lambda: results.append(cache.get_or_build(KEY, build)))
        for _ in range(8)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(builds) == 1
    assert sorted(results) == [(b"image", False)] * 7 + [(b"image", True)]


def test_different_kernels_are_built_at_the_same_time(cache: CubinCache) -> None:
    together = threading.Barrier(2, timeout=20)  # breaks if one waits for the other

    def build() -> bytes:
        together.wait()
        return b"image"

    other = threading.Thread(target=cache.get_or_build, args=(OTHER_KEY, build))
    other.start()
    assert cache.get_or_build(KEY, build) == (b"image", True)
    other.join()


def _hang_while_building(directory: Path, started: Connection) -> None:
    def build() -> bytes:
        started.send("building")
        time.sleep(600)
        return b"never"

    CubinCache(directory).get_or_build(KEY, build)


def test_a_builder_that_is_killed_does_not_block_the_others(cache: CubinCache) -> None:
    context = multiprocessing.get_context("spawn")
    started, report = context.Pipe(duplex=False)
    builder = context.Process(target=_hang_while_building, args=(cache.directory, report))
    builder.start()
    assert builder.pid is not None
    assert started.recv() == "building"
    killer = threading.Timer(0.3, os.kill, (builder.pid, signal.SIGKILL))
    killer.start()
    begin = time.monotonic()
    assert cache.get_or_build(KEY, lambda: b"image") == (b"image", True)
    assert 0.1 < time.monotonic() - begin < 10  # waited for the killed one, and only for it
    builder.join()


def test_a_stuck_builder_is_not_waited_for_forever(
    cache: CubinCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.directory.mkdir(mode=0o700)
    monkeypatch.setattr(cache_module, "_LOCK_PATIENCE_S", 0.1)
    with cache._process_lock(KEY):
        assert cache.get_or_build(KEY, lambda: b"image") == (b"image", True)


def test_a_child_forked_while_building_holds_no_lock(cache: CubinCache) -> None:
    children: list[int] = []

    def build() -> bytes:
        child = os.fork()
        if child == 0:
            time.sleep(600)
            os._exit(0)
        children.append(child)
        return b"image"

    try:
        cache.get_or_build(KEY, build)
        cache.entry_path(KEY).unlink()
        begin = time.monotonic()
        assert cache.get_or_build(KEY, lambda: b"image") == (b"image", True)
        assert time.monotonic() - begin < 10
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
