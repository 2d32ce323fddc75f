"""Signals outside of loops: one message, and nothing is lost; inside see test_loop.py."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from align_jax.training import signals
from align_jax.training.signals import Stopped, StopSignals, stopping_between_loops
from tests.devices import ROOT

# Holds the main thread in C for hours, as a compilation does for minutes.
BUSY = """
import hashlib, sys
from align_jax.training import signals
signals._PATIENCE = 0.3
with signals.stopping_between_loops(), signals.StopSignals(active=sys.argv[1] == "loop"):
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**7 if sys.argv[1] == "loop" else 2 * 10**9)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_between_loops_ends_the_run_by_name(number):
    with pytest.raises(Stopped, match=f"stopped by {number.name}. The same command") as caught:
        with stopping_between_loops():
            os.kill(os.getpid(), number)
    assert caught.value.signum == number


def test_a_repeated_sigterm_changes_nothing_and_ctrl_c_acts():
    saved = []
    with pytest.raises(KeyboardInterrupt):
        with stopping_between_loops():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                saved.append("everything")
                os.kill(os.getpid(), signal.SIGINT)
                saved.append("not reached")
    assert saved == ["everything"]


def test_in_a_loop_a_repeated_sigterm_changes_nothing():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(now=False) == signal.SIGTERM
        stop.received = None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_is_lost_between_loops_stops_the_next_loop(number):
    with stopping_between_loops():
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            pass  # as one of jax's callbacks does
        with pytest.raises(signals.Interrupted, match=f"stopped by {number.name} after step 1"):
            with StopSignals() as stop:
                raise signals.Interrupted(stop.agreed(now=True), 1)
    with StopSignals() as stop:
        assert stop.received is None


def test_a_signal_too_late_for_a_loop_acts_after_it():
    with pytest.raises(Stopped):
        with stopping_between_loops(), StopSignals():
            os.kill(os.getpid(), signal.SIGTERM)


def test_what_runs_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping_between_loops(), StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("where", "message"), [("loop", "SIGINT is noted"), ("start", "stopped")])
def test_a_signal_is_answered_while_the_main_thread_is_busy(where, message):
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, where],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "busy\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert f"align-jax: {message}" in errors
    if where == "start":
        assert process.returncode == 128 + signal.SIGINT
        assert errors.count("align-jax:") == 1 and "Traceback" not in errors


def test_a_listener_that_comes_late_ends_no_later_run(monkeypatch):
    ended, late, read = [], threading.Event(), os.read

    def slow(file, size):
        content = read(file, size)
        if content and threading.current_thread().name == "align_jax signals":
            late.wait(5)
        return content

    monkeypatch.setattr(signals, "_PATIENCE", 0.05)
    monkeypatch.setattr(signals.os, "read", slow)
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    with pytest.raises(Stopped), stopping_between_loops():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    with stopping_between_loops():
        late.set()
        time.sleep(0.5)
    assert not ended
