"""Programs forked from a server behave as if each had been started for itself."""

import fcntl
import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing import forkserver

import pytest

from megatron_ext.study import forked
from megatron_ext.transformer.transformer_engine import WITHOUT

FIRST = forked.PRELOADED[0]


def wait(program: forked.ForkedProgram, seconds: float = 60) -> int:
    deadline = time.monotonic() + seconds
    while (code := program.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return code


@pytest.fixture
def start(tmp_path):
    """A function that starts a program with this source, arguments and lock; its output goes to ``start.log``."""

    def start_script(source: str, *arguments: str, lock: int | None = None, threads: str = "1"):
        script = tmp_path / "script.py"
        script.write_text(source)
        environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": threads, "PYTHONPATH": str(forked.ROOT)}
        if lock is None:
            lock = os.open(tmp_path / "unused", os.O_RDWR | os.O_CREAT)
        return forked.start_program([sys.executable, str(script), *arguments], start_script.log, environment, lock)

    start_script.log = tmp_path / "log.txt"
    return start_script


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server of this test alone, which finds modules in ``tmp_path``."""
    own = forkserver.ForkServer()
    for name in ("ensure_running", "connect_to_new_process", "set_forkserver_preload"):
        monkeypatch.setattr(forkserver, name, getattr(own, name))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(forked, "PRELOADED", ("stand_in",))
    forked._can_fork.cache_clear()
    yield own
    forked._can_fork.cache_clear()
    own._stop()


def until_written(start, program) -> None:
    while not (start.log.exists() and start.log.read_text()):
        assert program.poll() is None
        time.sleep(0.02)


def test_a_forked_program_has_its_arguments_environment_and_exit_code_and_everything_imported(start):
    source = "import os, sys; print(__name__, sys.argv[1:], os.environ['OMP_NUM_THREADS'], 'HOME' in os.environ);"
    program = start(source + f"print(set({forked.PRELOADED}) - set(sys.modules)); sys.exit(3)", "--seed", "1")
    assert wait(program) == 3
    assert start.log.read_text() == "__main__ ['--seed', '1'] 1 False\nset()\n"


def test_a_forked_program_keeps_its_lock_and_gets_signals_and_nobody_waits_for_it_at_exit(start, tmp_path):
    source = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    program = start(source + "print('ready', flush=True); time.sleep(60)", lock=lock)
    os.close(lock)
    again = os.open(tmp_path / "lock", os.O_RDWR)
    until_written(start, program)
    assert program._process not in multiprocessing.active_children()
    with pytest.raises(BlockingIOError):
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    program.send_signal(signal.SIGTERM)
    assert wait(program) == 5
    program.send_signal(signal.SIGTERM)  # which has ended
    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(again)


def test_a_forked_program_has_its_own_random_state_threads_and_exit_functions(start, tmp_path):
    source = (
        "import numpy, os, sys, torch, weakref\n"
        "from megatron_ext.training.output_lock import hold_output\n"
        "hold_output(sys.argv[1])\n"
        "print(os.path.exists(sys.argv[1] + '/LOCK'), torch.get_num_threads(), flush=True)\n"
        "class Thing: pass\n"
        "thing = Thing(); weakref.finalize(thing, print, 'finalized', flush=True)\n"
        "print(numpy.random.random(), flush=True); raise ValueError('last')"
    )
    draws = []
    for _ in range(2):
        start.log.unlink(missing_ok=True)
        assert wait(start(source, str(tmp_path / "run"), threads="3,2")) == 1
        held, draw, *rest = start.log.read_text().splitlines()
        assert held == "True 3" and "finalized" in rest and rest[-1] == "ValueError: last"
        assert not (tmp_path / "run" / "LOCK").exists()
        draws.append(draw)
    assert draws[0] != draws[1]


def test_exit_functions_of_the_server_do_not_run_in_programs_and_its_libraries_have_their_threads(
    start, server, tmp_path
):
    (tmp_path / "stand_in.py").write_text(
        "import atexit, os, tempfile\nthreads = os.environ['OMP_NUM_THREADS']\n"
        "folder = tempfile.TemporaryDirectory()\natexit.register(folder.cleanup)\n"
    )
    before = dict(os.environ)
    for _ in range(2):
        source = "import os, stand_in; print(os.path.isdir(stand_in.folder.name), stand_in.threads)"
        assert wait(start(source, threads="2")) == 0
    assert start.log.read_text() == 2 * "True 2\n"
    assert os.environ == before


def test_programs_start_slowly_where_the_server_cannot_import(start, server, tmp_path, capfd):
    (tmp_path / "stand_in.py").write_text("raise RuntimeError('broken')")
    for _ in range(2):
        assert wait(start("print('started')")) == 0
    assert start.log.read_text() == 2 * "started\n"
    assert capfd.readouterr().err.count("start slowly instead") == 1


def test_transformer_engine_is_hidden_before_the_server_imports_anything_else(start, server, tmp_path, monkeypatch):
    engine = tmp_path / "transformer_engine"
    engine.mkdir()
    (engine / "__init__.py").write_text("raise RuntimeError('built for another machine')")
    (tmp_path / "stand_in.py").write_text("try:\n  import transformer_engine\nexcept ImportError: has = False")
    monkeypatch.setenv(WITHOUT, "1")
    monkeypatch.chdir(tmp_path)  # where the server does not find the package by itself
    monkeypatch.setattr(forked, "PRELOADED", (FIRST, "stand_in"))
    assert wait(start("import sys; print(sys.modules['stand_in'].has)")) == 0
    assert start.log.read_text() == "False\n"


def test_signals_to_the_whole_group_do_not_end_a_server_that_imports(start, server, tmp_path):
    (tmp_path / "stand_in.py").write_text("import time; time.sleep(0.5)")

    def signals() -> None:
        while server._forkserver_pid is None:
            time.sleep(0.01)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(server._forkserver_pid, number)

    threading.Thread(target=signals).start()
    assert wait(start("import sys; print('stand_in' in sys.modules)")) == 0
    assert start.log.read_text() == "True\n"


def test_a_program_whose_server_is_lost_runs_on(start, server, tmp_path):
    (tmp_path / "stand_in.py").write_text("")
    program = start("import time; print('ready', flush=True); time.sleep(60)")
    until_written(start, program)
    os.kill(server._forkserver_pid, signal.SIGKILL)
    time.sleep(0.2)
    assert program.poll() is None
    program.send_signal(signal.SIGTERM)
    assert wait(program) == forked.LOST
    assert "was lost" in start.log.read_text().splitlines()[-1]
