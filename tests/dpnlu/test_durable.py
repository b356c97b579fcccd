"""Files are there whole or not at all, and on disk before anything relies on them."""

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dpnlu.mechanism.durable import (
    locked,
    make_directory,
    partial_of,
    remove,
    remove_partials,
    replacing,
    sync,
    sync_tree,
    write_all,
    write_json,
    write_text,
)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done to files and directories, in order."""
    calls: list[str] = []
    opened: dict[int, str] = {}

    def noted(name: str, run: Callable[..., int]) -> Callable[..., int]:
        def call(place: int | Path | str, *given: object) -> int:
            file = opened[place] if isinstance(place, int) else Path(place).name
            calls.append(f"{name} {file}")
            result = run(place, *given)
            if name == "open":
                calls.pop()
                opened[result] = file
            return result

        return call

    for name in ("open", "write", "fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    return calls


def test_a_file_is_on_disk_before_it_takes_its_place_and_so_is_its_name(
    tmp_path: Path, done: list[str]
) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    assert done == [
        "write a.json",
        "fsync a.json",
        "replace a.json",
        f"fsync {tmp_path.name}",
    ]
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"x": 1}


def test_whoever_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_text(path, "before")
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("operation", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a"
    write_text(path, "before")
    with monkeypatch.context() as broken:
        broken.setattr(os, operation, full)
        with pytest.raises(OSError, match="No space"):
            write_text(path, "after")
    assert path.read_text(encoding="utf-8") == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_link_in_the_place_of_the_partial_file_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept", encoding="utf-8")
    partial = partial_of(tmp_path / "a")
    for target in (precious, tmp_path / "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / "a").write_text("kept", encoding="utf-8")
        partial.symlink_to(target)
        write_text(tmp_path / "a", "new")
        assert precious.read_text(encoding="utf-8") == "kept"
        assert (tmp_path / "folder" / "a").read_text(encoding="utf-8") == "kept"
        assert not partial.is_symlink()


def test_what_a_library_leaves_beside_its_file_is_left_in_the_partial_folder(
    tmp_path: Path,
) -> None:
    with replacing(tmp_path / "a") as place:
        place.with_name(".tmpX").touch()
        place.touch()
        assert [path.name for path in tmp_path.iterdir()] == ["a.partial"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_half_a_surrogate_pair_comes_back(tmp_path: Path) -> None:
    """JSON can hold it, UTF-8 cannot."""
    write_json(tmp_path / "a.json", ["\ud83d", "ε"])
    content = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(content) == ["\ud83d", "ε"] and "ε" in content


def test_what_is_written_in_pieces_is_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.write
    monkeypatch.setattr(os, "write", lambda file, content: really(file, content[:3]))
    with (tmp_path / "a").open("wb") as file:
        write_all(file.fileno(), b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_a_directory_is_made_with_all_names_on_disk(tmp_path: Path, done: list[str]) -> None:
    make_directory(tmp_path / "a" / "b")
    assert sorted(done) == sorted([f"fsync {tmp_path.name}", "fsync a"])
    done.clear()
    make_directory(tmp_path / "a" / "b")
    assert not done


def test_a_tree_is_synced_leaf_by_leaf(tmp_path: Path, done: list[str]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").touch()
    sync_tree(tmp_path)
    assert set(done) == {f"fsync {name}" for name in ("a", "b", tmp_path.name)}
    assert done[-1] == f"fsync {tmp_path.name}"


def test_a_file_system_that_cannot_sync_directories_is_put_up_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(_: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    (tmp_path / "a").touch()
    monkeypatch.setattr(os, "fsync", cannot)
    sync(tmp_path)
    with pytest.raises(OSError, match="Invalid"):
        sync(tmp_path / "a")


def test_a_directory_that_may_be_written_to_and_not_read_is_put_up_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "a").touch()
    monkeypatch.setattr(os, "open", denied)
    sync(tmp_path)
    with pytest.raises(PermissionError):
        sync(tmp_path / "a")


def test_a_file_system_without_locks_is_put_up_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fails)
    code = errno.ENOSYS
    assert locked(0)
    code = errno.EBADF
    with pytest.raises(OSError, match="Bad file"):
        locked(0)


def test_removing_is_done_once(tmp_path: Path, done: list[str]) -> None:
    (tmp_path / "a").touch()
    for _ in range(2):
        remove(tmp_path / "a")
    assert done == [f"fsync {tmp_path.name}"] and not list(tmp_path.iterdir())


def test_partial_files_and_folders_are_removed_wherever_they_are(tmp_path: Path) -> None:
    for name in ("x", "a/y", "a/y.partial/y", "a/y.partial/z.partial/z", "x.partial"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_partials(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "x", "y"]


def test_a_directory_is_locked_until_it_is_closed(tmp_path: Path) -> None:
    files = [os.open(tmp_path, os.O_RDONLY) for _ in range(2)]
    assert locked(files[0])
    assert not locked(files[1])
    os.close(files[0])
    assert locked(files[1])
    os.close(files[1])
