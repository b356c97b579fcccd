"""The farm keeps what is finished, and takes nothing that belongs to another study."""

from pathlib import Path

import numpy as np
import pytest

from attacks.farm import grow, load_arrays, save_arrays

KEY = {"study": "a", "size": 3}


class Counting:
    """Trains nothing, and remembers which models it was asked for."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.asked: list[int] = []
        self.fails_at = fails_at

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        if number == self.fails_at:
            raise KeyboardInterrupt
        self.asked.append(number)
        return {"loss": np.full(4, float(number)), "is_odd": np.array(number % 2 == 1)}


def measure(number: int) -> dict[str, np.ndarray]:
    """Importable, as another process wants it."""
    return {"loss": np.full(4, float(number))}


def test_results_come_in_the_order_of_the_models(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        told.append((done, total))

    found = grow(Counting(), count=3, directory=tmp_path, key=KEY, workers=1, progress=progress)
    assert [float(arrays["loss"][0]) for arrays in found] == [0, 1, 2]
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_an_interrupted_farm_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        grow(Counting(fails_at=2), count=4, directory=tmp_path, key=KEY, workers=1)
    train = Counting()
    found = grow(train, count=4, directory=tmp_path, key=KEY, workers=1)
    assert train.asked == [2, 3] and len(found) == 4
    more = Counting()
    assert len(grow(more, count=5, directory=tmp_path, key=KEY, workers=1)) == 5
    assert more.asked == [4]


def test_another_study_is_refused(tmp_path: Path) -> None:
    grow(Counting(), count=1, directory=tmp_path, key=KEY, workers=1)
    with pytest.raises(ValueError, match="this very study"):
        grow(Counting(), count=1, directory=tmp_path, key=KEY | {"size": 4}, workers=1)


def test_a_write_that_failed_leaves_no_result(tmp_path: Path) -> None:
    class Unwritable:
        def __array__(self, dtype=None, copy=None) -> np.ndarray:
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        save_arrays(tmp_path / "model-0000.npz", {"loss": Unwritable()})
    assert not (tmp_path / "model-0000.npz").exists()


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", loss=np.array([object()]))
    with pytest.raises(ValueError, match="pickle"):
        load_arrays(tmp_path / "bad.npz")


@pytest.mark.slow
def test_other_processes_give_the_same(tmp_path: Path) -> None:
    found = grow(measure, count=3, directory=tmp_path, key=KEY, workers=2)
    assert [float(arrays["loss"][0]) for arrays in found] == [0, 1, 2]
