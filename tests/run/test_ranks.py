"""Two processes that train together take the steps of one: losses, data, checkpoints, stops, errors and files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nbqlora.core.errors import RunError
from nbqlora.core.ranks import ALONE, Rank, rank_of, see_one_card, without_signs
from nbqlora.run.ranks import check_own_cards
from tests import tiny
from tests.run import resuming
from tests.run.ranks_job import LAYOUTS, PLAIN, seen

ROOT = Path(__file__).parents[2]
REFERENCES = {name: LAYOUTS[name] for name in ("joined", "uneven", "packed", "other adapters")}
STOPPED_AFTER = 2


def events(run: Any) -> list[Any]:
    return [found for event in run.events if (found := seen(event))]


def of(kind: str, told: list[Any]) -> list[Any]:
    return [event[1:] for event in told if event[0] == kind]


def start(rank: int, folder: Path, port: int, job: str = "ranks_job") -> subprocess.Popen[str]:
    """A rank, with what torchrun sets."""
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    own = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.run.{job}", str(folder)],
        cwd=ROOT,
        env={**os.environ, **own, **{name: str(value) for name, value in group.items()}},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def told_by_two(folder: Path, job: str = "ranks_job") -> tuple[dict[str, Any], dict[str, Any]]:
    """What each of two ranks says, which run this job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start(rank, folder, port, job) for rank in (0, 1)]
    try:
        ended = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(text[-3000:] for text in ended)
    first, second = (json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    return first, second


@pytest.fixture(scope="module")
def folder(quick: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a row without a finite loss, and a whole run of one process, at whose fourth step two go on."""
    made = tmp_path_factory.mktemp("ranks")
    tiny.save_model(made / "model")
    tiny.save_model(made / "bad model", bad_token="~")
    bad = json.loads(json.dumps(resuming.ROWS))
    bad[5]["messages"][0]["content"] += " ~"
    (made / "bad.json").write_text(json.dumps(bad))
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[Any]]:
    """What one process says of the same runs."""
    whole = resuming.finetune(folder / "model", folder / "whole", **PLAIN, **resuming.EVERY_STEP)
    resuming.until(4, folder / "whole", folder / "one to two")
    found = {"padded": events(whole)}
    for name, layout in REFERENCES.items():
        found[name] = events(resuming.finetune(folder / "model", folder / f"{name} alone", **{**PLAIN, **layout}))
    return found


@pytest.fixture(scope="module")
def together(folder: Path, alone: dict[str, list[Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each of two ranks says."""
    return told_by_two(folder)


def check_same_path(told: list[Any], reference: list[Any]) -> None:
    """Steps and evaluations as one process has them: order, schedule, losses, norms."""
    steps, others = of("step", told), of("step", reference)
    assert [step[0] for step in steps] == [step[0] for step in others]
    for mine, its in zip(steps, others, strict=True):
        loss, norm, rate, tokens = mine[1:]
        assert loss == pytest.approx(its[1], rel=1e-4)
        assert norm == pytest.approx(its[2], rel=1e-4)
        assert rate == its[3]
        assert 0 <= tokens - its[4] <= 2, "where a rank has no row it runs two tokens that teach nothing"
    evals, others = of("eval", told), of("eval", reference)
    assert [e[0] for e in evals] == [e[0] for e in others]
    assert [e[1] for e in evals] == pytest.approx([e[1] for e in others], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "reference", "plan"),
    [
        ("padded", "padded", None),
        ("accumulated", "padded", [2, 1, 2, 4]),
        ("joined", "joined", [2, 2, 1, 4]),
        ("uneven", "uneven", [2, 2, 1, 3]),
        ("packed", "packed", [2, 2, 1, 3]),
        ("other adapters", "other adapters", [2, 2, 1, 4]),
    ],
)
def test_the_loss_path_is_that_of_one(
    alone: dict[str, Any], together: Any, name: str, reference: str, plan: list[int] | None
) -> None:
    for told in (rank[name] for rank in together):
        assert told["status"] == "done"
        check_same_path(told["events"], alone[reference])
        assert plan is None or told["plan"] == plan


def test_ranks_say_the_same(together: Any) -> None:
    first, second = together
    for name in LAYOUTS:
        for kind in ("step", "eval"):
            assert of(kind, first[name]["events"]) == of(kind, second[name]["events"])


def test_only_the_first_writes(folder: Path, together: Any) -> None:
    first, second = together
    assert of("saved", first["padded"]["events"])[-1] == [9, "adapter"]
    assert [of("saved", told["events"]) for told in second.values()] == [[]] * len(second)
    assert not [path for path in folder.glob("*, rank 1/**/*") if path.is_file()]
    assert resuming.saved_steps(folder / "padded") == [*range(1, 10)]
    assert json.loads((folder / "padded" / "run.json").read_text())["status"] == "done"


def test_one_goes_on_as_two(alone: dict[str, Any], together: Any) -> None:
    told = together[0]["one to two"]["events"]
    reference = [event for event in alone["padded"] if event[0] in ("step", "eval") and event[1] > 4]
    check_same_path(told, reference)


def test_two_go_on_as_one(folder: Path, alone: dict[str, Any], together: Any) -> None:
    out = resuming.until(5, folder / "padded", folder / "two to one")
    run = resuming.finetune(folder / "model", out, resume=True, **PLAIN)
    check_same_path(events(run), alone["padded"])
    assert of("step", events(run))[:5] == of("step", together[0]["padded"]["events"])[:5], "told again as it was"


def test_two_go_on_as_two_bit_for_bit(folder: Path, together: Any) -> None:
    whole, again = (together[0][name]["events"] for name in ("dropout", "dropout again"))
    assert of("step", again) == of("step", whole)[4:]
    files = [resuming.weights(folder / name / "adapter") for name in ("dropout", "dropout again")]
    assert files[0] == files[1]
    assert of("step", whole)[-1] != of("step", together[0]["padded"]["events"])[-1], "dropout is at work"


def test_a_stop_on_one_ends_both_after_the_same_step(folder: Path, together: Any) -> None:
    for told in (rank["stopped"] for rank in together):
        assert told["status"] == "stopped"
        ((step, reason),) = of("stopped", told["events"])
        assert STOPPED_AFTER <= step <= STOPPED_AFTER + 1
        assert reason == "interrupted"
        assert of("step", told["events"])[-1][0] == step
    assert of("saved", together[0]["stopped"]["events"])[-1][1] == "adapter"


def test_a_loss_that_is_not_finite_on_one_ends_both(together: Any) -> None:
    for told in (rank["not finite"] for rank in together):
        kind, text = told["error"]
        assert kind == "NonFiniteLossError"
        assert text.startswith("the loss of step 2 is not finite, on the data's rows 6; the adapter of step 1 was kept")
        assert [step[0] for step in of("step", told["events"])] == [1]


def test_ranks_that_would_differ_do_not_begin(together: Any) -> None:
    text = (
        "rank 1 would not do what rank 0 does (0 -> 1):\n"
        "  learning_rate  0.001 -> 0.002\n"
        "  give all the same file, data, model and output_dir (a folder that all of them see)"
    )
    assert [told["not alike"]["error"] for told in together] == [["RunError", text]] * 2


def test_what_fails_on_one_is_said_by_all(together: Any) -> None:
    first, second = (told["on one alone"]["error"] for told in together)
    assert second[0] == "DataError"
    assert first == ["RunError", f"rank 1 of 2 cannot go on: DataError: {second[1]}"]


LOCAL = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
GROUP = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1", **LOCAL}


def test_what_the_environment_says() -> None:
    rank = rank_of(GROUP)
    assert rank == Rank(number=3, n=4, local=1, n_local=2)
    assert (rank.n_nodes, rank.first, rank.alone) == (2, False, False)
    assert rank_of({}) == rank_of({"RANK": "0", "WORLD_SIZE": "1"}) == ALONE
    assert rank_of({k: v for k, v in GROUP.items() if k not in LOCAL}) == Rank(number=3, n=4, local=3, n_local=4)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"MASTER_PORT": ""}, "RANK is set and MASTER_PORT is not; start the ranks with torchrun, or set all of them"),
        ({"RANK": "x"}, "RANK = 'x' is no whole number; start the ranks with torchrun"),
        ({"RANK": "4"}, "these variables do not fit together: RANK 4 of WORLD_SIZE 4, LOCAL_RANK 1 of LOCAL_WORLD_SIZE "
         "2; start the ranks with torchrun"),
    ],
)  # fmt: skip
def test_an_environment_that_cannot_be(change: dict[str, str], text: str) -> None:
    with pytest.raises(RunError) as caught:
        rank_of({**GROUP, **change})
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("visible", "card"), [(None, "1"), ("4,6", "6"), ("GPU-a,GPU-b", "GPU-b"), ("7", "7"), ("", "")]
)
def test_a_rank_sees_its_own_card(visible: str | None, card: str) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    see_one_card(rank_of(GROUP), environ)
    assert environ["CUDA_VISIBLE_DEVICES"] == card


def test_more_ranks_than_cards() -> None:
    rank = Rank(number=0, n=4, local=0, n_local=4)
    with pytest.raises(RunError, match=r"^2 cards are visible \(CUDA_VISIBLE_DEVICES = '0,1'\) and 4 processes were"):
        see_one_card(rank, {"CUDA_VISIBLE_DEVICES": "0,1"})


def test_a_process_alone_keeps_its_cards() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "0,1"}
    see_one_card(ALONE, environ)
    assert environ == {"CUDA_VISIBLE_DEVICES": "0,1"}


def test_signs_are_taken_and_can_be_put_back() -> None:
    environ = {**GROUP, "HOME": "/"}
    taken = without_signs(environ)
    assert environ == {"MASTER_ADDR": "a", "MASTER_PORT": "1", "HOME": "/"}
    assert {**environ, **taken} == {**GROUP, "HOME": "/"}


def test_each_rank_has_a_card_of_its_own() -> None:
    check_own_cards([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-1")])
    message = r"ranks 1 and 2 of 3 have the same card \(GPU-2 of a\); leave CUDA_VISIBLE_DEVICES out, or let it list"
    with pytest.raises(RunError, match=message):
        check_own_cards([("a", "GPU-1"), ("a", "GPU-2"), ("a", "GPU-2")])
