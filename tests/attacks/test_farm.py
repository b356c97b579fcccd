"""The farm keeps what is finished, and takes nothing that belongs to another study."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
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


@pytest.mark.parametrize(("count", "workers"), [(-1, 1), (2.0, 1), (2, 0), (2, -1), (2, 1.5)])
def test_numbers_out_of_range_are_refused(count: int, workers: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="as a whole number"):
        grow(Counting(), count=count, directory=tmp_path / "farm", key=KEY, workers=workers)
    assert not (tmp_path / "farm").exists()


@pytest.mark.parametrize("size", [0, 1, 100, 300])
def test_a_damaged_result_is_named(size: int, tmp_path: Path) -> None:
    path = tmp_path / "model-0000.npz"
    save_arrays(path, {"loss": np.arange(9.0), "name": np.array("x")})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model-0000\.npz to hold arrays, found it damaged"):
        load_arrays(path)
    path.write_bytes(b"\x93NUMPY" + bytes(100))
    with pytest.raises(ValueError, match="found it damaged"):
        load_arrays(path)


FARM = """
    import os, sys, time
    from pathlib import Path
    from attacks.farm import grow

    def train(number):
        Path(sys.argv[1], f"{number}-{os.getpid()}").touch()
        time.sleep(1000)

    if __name__ == "__main__":
        grow(train, count=3, directory=Path(sys.argv[1], "farm"), key={}, workers=2)
"""


def _runs(process: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for has."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _soon(condition: Callable[[], bool]) -> bool:
    """Whether it holds within a minute."""
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.1)
    return False


def _interrupt_group(farm: int, worker: int) -> None:
    os.killpg(farm, signal.SIGINT)  # what a terminal does on Ctrl-C


def _kill_farm(farm: int, worker: int) -> None:
    os.kill(farm, signal.SIGKILL)


def _kill_worker(farm: int, worker: int) -> None:
    os.kill(worker, signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("end", [_interrupt_group, _kill_farm, _kill_worker])
def test_no_worker_outlives_the_farm_or_complains(
    end: Callable[[int, int], None], tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(FARM), encoding="utf-8")
    farm = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert farm.stderr is not None
    with farm, farm.stderr:
        assert _soon(lambda: len(list(tmp_path.glob("*-*"))) == 2)
        workers = [int(path.name.split("-")[1]) for path in tmp_path.glob("*-*")]
        assert all(map(_runs, workers))
        end(farm.pid, workers[0])
        complaints = farm.stderr.read()
    assert farm.returncode != 0
    assert _soon(lambda: not any(map(_runs, workers)))
    assert complaints.count("Traceback") == (0 if end is _kill_farm else 1), "the farm's own"
    if end is _kill_worker:
        assert "WorkerDiedError: Expected every worker to finish its models" in complaints
