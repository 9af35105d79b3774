"""The handlers of a stop on their own: whose signal they take, whom they leave it to, what must wait."""

from __future__ import annotations

import os
import signal

import pytest

from nbqlora.train.stop import INTERRUPTED, TERMINATED, TIME_IS_UP, Stop
from tests.train.interrupts import handler, interrupt

__all__ = ["handler"]  # autouse


def test_stop_by_request_and_once() -> None:
    stop = Stop()
    assert stop.reason == ""
    stop.request("enough")
    stop.request("more")
    assert stop.reason == "enough"


def test_a_note_that_cannot_be_printed_now_does_not_stop_the_run() -> None:
    def refuse() -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    with Stop(on_request=refuse) as stop:
        interrupt()
        assert stop.reason == INTERRUPTED
        with pytest.raises(KeyboardInterrupt):
            interrupt()


def test_an_interrupt_after_time_is_up_is_still_the_first() -> None:
    with Stop(max_minutes=1e-9) as stop:
        assert stop.reason == TIME_IS_UP
        interrupt()
        assert stop.reason == INTERRUPTED


def test_an_ignored_interrupt_stays_ignored() -> None:
    """As in ``nbqlora finetune job.toml &`` of a script: a Ctrl-C is meant for what runs in front."""
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop:
            interrupt()
            assert stop.reason == ""
            interrupt(signal.SIGTERM)
            assert stop.reason == TERMINATED
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, former)


def test_a_handler_that_python_could_not_put_back_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as below:
        below.setattr(signal, "getsignal", lambda number: None)
        with Stop() as stop:
            pass
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert stop.reason == ""


def test_a_termination_that_somebody_handles_is_theirs() -> None:
    told: list[int] = []
    former = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        with Stop() as stop:
            interrupt(signal.SIGTERM)
            assert (told, stop.reason) == ([signal.SIGTERM], "")
    finally:
        signal.signal(signal.SIGTERM, former)


def test_a_second_interrupt_waits_for_what_is_held_and_a_third_does_not() -> None:
    done: list[str] = []
    with Stop() as stop:
        interrupt()
        with pytest.raises(KeyboardInterrupt), stop.held():
            interrupt()
            done.append("whole")
        with pytest.raises(KeyboardInterrupt), stop.held():
            interrupt()
            interrupt()
            done.append("never")
        with pytest.raises(OSError, match="disk full"), stop.held():
            interrupt()
            raise OSError("disk full")
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert done == ["whole"]


@pytest.mark.parametrize(("number", "ending"), [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_forked_process_neither_stops_nor_speaks_but_can_be_ended(number: int, ending: int) -> None:
    told: list[int] = []
    with Stop(on_request=lambda: told.append(os.getpid())) as stop:
        child = os.fork()
        if not child:
            os.kill(os.getpid(), number)
            os._exit(0 if not stop.reason and not told else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == ending
        assert (stop.reason, told) == ("", [])
        interrupt(number)
        assert told == [os.getpid()]


def test_the_mean_of_the_last_steps_must_find_room() -> None:
    now = 0.0
    stop = Stop(max_minutes=1, clock=lambda: now)
    for seconds in (500.0, 12.0, 8.0, 10.0, 10.0, 10.0):
        stop.step_done(seconds)
    now = 49.9
    assert stop.reason == "", "an old step, long ago, still counts"
    now = 50.1
    assert stop.reason == TIME_IS_UP
