"""What a stranger or a mistake can do to the Studio, and what it says: headers, passwords, folders, lengths, memory, load."""

import asyncio
from collections.abc import MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.load import load
from tests.studio.test_app import ask
from vgm_peft.studio.drawing import explain
from vgm_peft.studio.guard import HEADERS, TRIES, Guard

if TYPE_CHECKING:
    from vgm_peft.studio.app import Studio


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/", "GET", 200),
        ("/config", "GET", 200),
        ("/gradio_api/info", "GET", 200),
        ("/nothing/there", "GET", 404),
        ("/gradio_api/queue/join", "GET", 405),
        ("/gradio_api/upload", "POST", 400),
        ("/gradio_api/file=/etc/passwd", "GET", 403),
        ("/gradio_api/call/draw", "POST", 422),
    ],
)
def test_every_answer_has_the_headers(address: str, path: str, method: str, status: int) -> None:
    answer = ask(address, path, method)
    assert answer.status == status
    for name, value in HEADERS:
        assert answer.getheader(name.decode()) == value.decode()


def answers(app: Any, scope: dict[str, Any]) -> MutableMapping[str, Any]:
    """The start of the answer of an application behind the guard."""
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    asyncio.run(
        app({"type": "http", "headers": [], "method": "GET", "path": "/", "client": ("1.1.1.1", 1), **scope}, receive, send)
    )
    return sent[0]


def test_an_error_of_ours_has_them_too_and_tells_nothing() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("the secret")

    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    with pytest.raises(ValueError, match="the secret"):  # the server's log has it
        asyncio.run(Guard(broken)({"type": "http", "headers": [], "path": "/"}, None, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 500 and set(HEADERS) <= set(sent[0]["headers"]) and b"secret" not in sent[1]["body"]


def test_passwords_cannot_be_tried_out() -> None:
    async def door(scope: Any, receive: Any, send: Any) -> None:
        right = scope["path"] == "/login" and dict(scope["headers"]).get(b"password") == b"right"
        await send({"type": "http.response.start", "status": 200 if right else 400, "headers": []})

    guard = Guard(door)
    login = {"path": "/login", "method": "POST"}
    assert [answers(guard, login)["status"] for _ in range(TRIES)] == [400] * TRIES
    right = {**login, "headers": [(b"password", b"right")]}
    assert answers(guard, right)["status"] == 429 and answers(guard, {**right, "path": "/login/"})["status"] == 429
    assert answers(guard, {**right, "client": ("2.2.2.2", 1)})["status"] == 200  # whoever else is not kept out
    assert answers(guard, {"path": "/other"})["status"] == 400


def test_uploads_of_trainings_are_not_served(address: str, studio: "Studio") -> None:
    ticket = studio.settings.queue / "000777" / "me" / "001.png"
    ticket.parent.mkdir(parents=True)
    ticket.write_bytes(b"x")
    assert ask(address, f"/gradio_api/file={ticket}").status == 403
    assert ask(address, f"/gradio_api/file={studio.settings.runs}/robot/../.queue/000777/me/001.png").status in (403, 404)


def test_running_out_of_memory_is_said_with_its_cures() -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(2**56, dtype=torch.float32)
    assert explain(caught.value).startswith("Out of memory.")
    assert explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")).startswith("Out of memory.")


def test_a_prompt_has_an_end(address: str) -> None:
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(address, verbose=False)
    for prompt in ("x" * 8_001, "x" * 3_000_000):
        with pytest.raises(AppError, match="prompt"):
            client.predict(prompt, {}, {"steps": 1}, api_name="/draw")
        with pytest.raises(AppError, match="prompt"):
            client.predict(prompt, ["robot"], 1, {"steps": 1}, api_name="/compare")


def test_of_many_clients_at_once_everyone_gets_the_own_picture_once(address: str, studio: "Studio") -> None:
    before = set(studio.settings.pictures.glob("*.png"))
    tally = load(address, clients=10, jobs=2)
    new = {str(path) for path in set(studio.settings.pictures.glob("*.png")) - before}
    assert tally.wrong == [] and set(tally.files) == new and set(tally.files.values()) == {1} and len(new) == 20
    assert studio.engine.base() is studio.engine.loaded


def test_no_upload_field_is_forgotten(studio: "Studio") -> None:
    """Where the page takes files; each is read by `read_picture` or as a stack, never kept as it came."""
    kinds = ("file", "image", "uploadbutton", "imageeditor", "gallery", "audio", "video", "multimodaltextbox", "dataframe")
    components = studio.page.get_config_file()["components"]
    takes = [c for c in components if c["type"] in kinds and c["props"].get("interactive") is not False]
    named = {c["props"].get("elem_id") or c["type"] for c in takes}
    assert {"uploads", "control-picture"} <= named
    assert named <= {"uploads", "control-picture", "begin-picture", "open-stack", "uploaded", "file"}, named


def test_the_library_and_pictures_can_vanish_while_a_page_is_open(address: str, studio: "Studio", tmp_path: Path) -> None:
    from vgm_peft.studio.catalogue import Catalogue

    catalogue = Catalogue(studio.engine)
    (path,) = [found.path for found in studio.engine.deltas() if found.name == "style"]
    aside = path.rename(tmp_path / "aside.safetensors")
    try:
        assert [entry.why for entry in catalogue.entries("style", patience=30)] in ([], ["it has gone"])
    finally:
        aside.rename(path)
