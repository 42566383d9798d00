"""Trainings asked for in the Studio: the queue of files, what outlives a kill, the preflight, the record as it grows."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from PIL import Image, ImageDraw

from vgm_peft.errors import ConfigError, DataError, TrainError
from vgm_peft.studio.jobs import WAITING, Desk, Past
from vgm_peft.studio.metrics import POINTS, Metrics
from vgm_peft.studio.settings import Settings
from vgm_peft.studio.tickets import write_ticket
from vgm_peft.studio.wishes import ANNOTATORS, Wish, aims, presets, recipe_of
from vgm_peft.train.lock import holder

if TYPE_CHECKING:
    from vgm_peft.studio.app import Studio

APP = """
import os, signal, sys
from pathlib import Path
from vgm_peft.studio.jobs import Desk
from vgm_peft.studio.settings import Settings
from vgm_peft.studio.wishes import Wish
home, runs, *files = sys.argv[1:]
desk = Desk(Settings(base=home + "/base", runs=Path(runs), recipe=Path(home, "quick.toml")))
for name in ("first", "second", "third"):
    desk.start(Wish(name=name, class_prompt="a toy", steps=2), files)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def subject(tmp_path: Path) -> list[str]:
    files: list[str] = []
    for i in range(3):
        image = Image.new("RGB", (64, 64), (60 * i, 120, 200 - 30 * i))
        ImageDraw.Draw(image).ellipse((8 + 8 * i, 12, 40 + 8 * i, 44), fill="#cc2222")
        image.save(tmp_path / f"me-{i}.png")
        files.append(str(tmp_path / f"me-{i}.png"))
    return files


@pytest.fixture
def desk(home: Path, studio: "Studio", tmp_path: Path) -> Desk:
    """A queue of its own, which nobody moves until it is woken."""
    return Desk(Settings(base=str(home / "base"), runs=tmp_path / "runs", recipe=home / "quick.toml"))


def until(happens: Callable[[], Any], seconds: float = 240.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := happens()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def statuses(desk: Desk) -> list[str]:
    return [state.status for state in desk.states()]


def test_queue_and_trainings_outlive_a_killed_studio(desk: Desk, home: Path, subject: list[str]) -> None:
    runs = desk.settings.runs
    app = subprocess.run([sys.executable, "-c", APP, str(home), str(runs), *subject], timeout=300)
    assert app.returncode == -signal.SIGKILL
    until(lambda: statuses(desk) == ["running", "waiting", "waiting"])  # what trains is found again, what waits waits
    assert desk.states()[1].message == "Waits; 1 comes first"

    supervisor = psutil.Process(holder(desk.ticket(1).folder))
    (training,) = until(supervisor.children)
    supervisor.kill()
    training.kill()
    until(lambda: statuses(desk) == ["interrupted", "waiting", "waiting"])
    assert "Go on takes it up again" in desk.states()[0].message
    with pytest.raises(TrainError, match='"second" is waiting; expected one that ended'):
        desk.go_on(2)
    desk.stop(3)  # what waits is taken out
    assert statuses(desk) == ["interrupted", "waiting"]

    desk.go_on(1)
    try:
        until(lambda: statuses(desk) == ["running", "waiting"])
        desk.stop(1)
        until(lambda: statuses(desk) == ["stopped", "running"])  # the next one begins by itself
        desk.stop(2)
        until(lambda: statuses(desk) == ["stopped", "stopped"])
    finally:
        desk.close()
    desk.remove(2)
    assert statuses(desk) == ["stopped"] and not (desk.queue / "000002").exists()


def test_what_a_training_took_tells_what_one_alike_will_take(desk: Desk, subject: list[str]) -> None:
    wish = Wish(name="first", class_prompt="a toy", steps=10)
    ticket = write_ticket(desk.queue, 1, desk.settings, wish, subject)
    ticket.run.mkdir(parents=True)
    (ticket.run / "metrics.jsonl").write_text(lines(1, 10))
    (ticket.folder / "end.json").write_text(json.dumps({"status": 0, "seconds": 15.0, "peak": 10**9}))
    past = desk.alike(Wish(name="next", class_prompt="another", token="xyz", steps=100))
    assert past == Past("first", 10, 0.5, 15.0, 10**9)
    assert past.seconds_for(100) == 60.0  # ten seconds to get ready
    assert desk.alike(Wish(name="next", class_prompt="a toy", steps=10, method="loha")) is None


def test_the_queue_is_bounded_and_a_name_is_given_once(desk: Desk, subject: list[str]) -> None:
    for number in range(1, WAITING + 1):
        wish = Wish(name=f"job {number}", class_prompt="a toy", steps=2)
        write_ticket(desk.queue, number, desk.settings, wish, subject[:1])
    with pytest.raises(TrainError, match=f"{WAITING} trainings wait already"):
        desk.start(Wish(name="one more", class_prompt="a toy", steps=2), subject)
    with pytest.raises(TrainError, match='a run named "job 3" exists'):
        desk.start(Wish(name="job 3", class_prompt="a toy", steps=2), subject)
    assert statuses(desk) == ["waiting"] * WAITING
    with pytest.raises(DataError):
        write_ticket(desk.queue, 99, desk.settings, Wish(name="bad", class_prompt="a toy", steps=2), [])
    assert not list(desk.queue.glob("*99*"))  # whole or not at all
    (desk.queue / "000004" / "ticket.json").write_text('{"wish": {"name": "../../x"}}')
    fresh = Desk(desk.settings)
    assert [state.number for state in fresh.states()] == [1, 2, 3, 5, 6, 7, 8]  # a damaged ticket stops no other
    with pytest.raises(TrainError, match="there is no training 4"):
        fresh.stop(4)


def test_a_training_that_cannot_even_begin_fails_and_is_not_tried_for_ever(
    desk: Desk, subject: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    desk.start(Wish(name="x", class_prompt="a toy", steps=2), subject)
    until(lambda: statuses(desk) == ["failed"], 30)
    desk.close()


def test_captions_come_with_the_pictures(desk: Desk, subject: list[str], tmp_path: Path) -> None:
    (tmp_path / "me-1.txt").write_text("a red\ndisc")
    wish = Wish(name="style", class_prompt="a toy", token="", task="finetune", steps=2)
    ticket = write_ticket(desk.queue, 1, desk.settings, wish, [*subject, str(tmp_path / "me-1.txt")])
    texts = [path.read_text() for path in sorted((ticket.folder / "style").glob("*.txt"))]
    assert texts == ["a toy", "a red disc", "a toy"]
    (tmp_path / "other.txt").write_text("nothing")
    with pytest.raises(DataError, match="other.txt: there is no picture of this name"):
        write_ticket(desk.queue, 2, desk.settings, wish, [*subject, str(tmp_path / "other.txt")])


def test_every_task_can_be_asked_for(tmp_path: Path) -> None:
    from vgm_peft.annotate import NAMES
    from vgm_peft.train.config import bind
    from vgm_peft.train.tasks import TABLE

    assert list(aims()) == list(TABLE) and set(ANNOTATORS) <= set(NAMES)
    for task, aim in aims().items():
        wish = Wish(name="x", class_prompt="a toy", token=aim.begin[1], task=task, steps=5)
        config = bind(wish.table("toybox", tmp_path, tmp_path / "run"))
        assert config.task.name == task and bool(config.data.annotator) == aim.annotated == TABLE[task].steered
        offered = presets(task, "toybox")
        assert offered and all(preset.about and preset.steps for preset in offered)
        assert recipe_of(Wish(**{**vars(wish), "preset": offered[0].name}), "toybox", None) == offered[0].path
    assert presets("dreambooth", "toybox")[0].name == "dreambooth-lora-toybox"
    for name in ("../x", "finetune-lora-toybox", "dreambooth-lora-sdxl"):
        with pytest.raises(ConfigError, match="there is no preset"):
            recipe_of(Wish(name="x", class_prompt="a toy", steps=5, preset=name), "toybox", None)


def test_the_preflight_says_what_a_training_will_be(desk: Desk, studio: "Studio", subject: list[str]) -> None:
    from vgm_peft.studio.preflight import preflight

    base = studio.engine.base()
    wish = Wish(name="x", class_prompt="a toy", steps=100)
    found = preflight(wish, subject, desk, base)
    assert not found.wrong and "3 pictures of 64 x 64" in found.pictures and found.trained
    assert "not known yet" in found.time and "at least" in found.memory and "Ready to train" in found.html()
    twice = preflight(wish, [subject[0], subject[0]], desk, base)
    assert "the same picture more than once: 001.png, 002.png" in twice.wrong and "“Go on in spite of”" in twice.wrong
    assert "&lt;" not in twice.html() and str(desk.queue) not in twice.html()
    assert not list(desk.queue.glob(".check-*"))


def lines(first: int, last: int) -> str:
    return "".join(json.dumps({"step": i, "loss": 1.0 / i, "seconds": 0.5}) + "\n" for i in range(first, last + 1))


def test_the_record_is_read_as_it_grows(tmp_path: Path) -> None:
    path, metrics = tmp_path / "metrics.jsonl", Metrics()
    metrics.update(path)
    assert (metrics.step, metrics.loss, metrics.curve(10)) == (0, None, "")
    path.write_text(lines(1, 3) + '{"step": 4, "lo')  # a line that is just being written
    metrics.update(path)
    assert (metrics.step, metrics.pace, len(metrics.points)) == (3, 0.5, 3)
    path.write_text(lines(1, 5000))
    metrics.update(path)
    assert metrics.step == 5000 and POINTS <= len(metrics.points) < 2 * POINTS
    assert metrics.points[0][1] > metrics.points[1][1] > metrics.points[-1][1]
    assert metrics.points[-1][0] == pytest.approx(5000, abs=16)
    assert metrics.curve(5000).startswith('<figure class="curve"><svg')
    path.write_text(lines(1, 2))  # it went back to a checkpoint
    metrics.update(path)
    assert (metrics.step, len(metrics.points)) == (2, 2)


def test_programs_train_with_what_they_uploaded_and_nothing_else(address: str, studio: "Studio", subject: list[str]) -> None:
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client = Client(address, verbose=False)
    wish = {"name": "by program", "class_prompt": "a toy", "steps": 2}
    told = client.predict([handle_file(file) for file in subject], wish, api_name="/preflight")
    assert told["wrong"] == "" and told["trained"] > 0
    hostile: list[Any] = ["/etc/passwd", {"path": "/etc/passwd"}, {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]
    hostile += [{"path": str(studio.settings.runs / "robot" / "delta.safetensors")}, {"url": "http://127.0.0.1:1/x.png"}, 5]
    for file in hostile:
        with pytest.raises((AppError, ValueError)):
            client.predict([file], wish, api_name="/train")
    for wrong in ({**wish, "name": "../x"}, {**wish, "flags": ["--set=x"]}, {**wish, "steps": "2"}, {**wish, "preset": "../x"}):
        with pytest.raises(AppError):
            client.predict([handle_file(file) for file in subject], wrong, api_name="/train")
    assert not any(told["name"] == "by program" for told in client.predict(api_name="/trainings"))
    with pytest.raises(AppError, match="there is no training 77"):
        client.predict(77, api_name="/stop_training")
