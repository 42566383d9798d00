"""The Studio without a browser: who may reach it, what it serves, its named endpoints, uploads and trainings."""

import http.client
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

import vgm_peft
from vgm_peft.cli import main
from vgm_peft.errors import ConfigError, DataError, TrainError
from vgm_peft.formats.fitting import misfit
from vgm_peft.header import open_header
from vgm_peft.stack.library import find
from vgm_peft.studio.settings import Settings, parse_auth
from vgm_peft.studio.uploads import keep_pictures
from vgm_peft.studio.wishes import ALLOWED, Wish

if TYPE_CHECKING:
    from vgm_peft.studio.app import Studio


def ask(address: str, path: str = "/", method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    return connection.getresponse()


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.com"},
        {"Host": "evil.com:7860"},
        {"Host": "127.0.0.1.evil.com"},
        {"Host": ""},
        {"Host": "127.0.0.1@evil.com"},
        {"Origin": "http://evil.com"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_strangers_are_turned_away(address: str, headers: dict[str, str]) -> None:
    for path, method in (("/gradio_api/info", "GET"), ("/gradio_api/upload", "POST"), ("/gradio_api/queue/join", "POST")):
        assert ask(address, path, method, **headers).status == 403


def test_own_pages_are_served_with_safe_headers(address: str) -> None:
    answer = ask(address, Host=address.removeprefix("http://").replace("127.0.0.1", "localhost"))
    assert answer.status == 200
    assert answer.getheader("X-Content-Type-Options") == "nosniff"
    assert "frame-ancestors 'none'" in (answer.getheader("Content-Security-Policy") or "")
    assert ask(address, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate").status == 200  # a link from elsewhere
    body = ask(address).read().decode()
    assert "fonts.googleapis" not in body and "https://cdn" not in body


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "file:///etc/passwd", "/proc/self/environ"]
)
def test_only_the_configured_folders_are_readable(address: str, home: Path, path: str) -> None:
    assert ask(address, f"/gradio_api/file={path}").status in (403, 404)
    assert ask(address, f"/gradio_api/file={home / 'base' / 'model_index.json'}").status == 403
    (home / "pictures" / "link.png").unlink(missing_ok=True)
    (home / "pictures" / "link.png").symlink_to(home / "base" / "model_index.json")
    assert ask(address, f"/gradio_api/file={home / 'pictures' / 'link.png'}").status == 403


@pytest.fixture
def client(address: str) -> Any:
    from gradio_client import Client

    return Client(address, verbose=False)


def test_every_action_has_a_named_endpoint(client: Any, home: Path) -> None:
    from gradio_client.exceptions import AppError

    assert {"robot", "style"} <= set(client.predict(api_name="/deltas"))
    settings = {"steps": 2, "seed": 5, "count": 2}
    first = client.predict("a toy", {"robot": 0.5}, settings, api_name="/draw")
    again = client.predict("a toy", {"robot": 0.5}, settings, api_name="/draw")
    assert [Image.open(f).tobytes() for f in first["files"]] == [Image.open(f).tobytes() for f in again["files"]]
    assert all(Path(f).parent == home / "pictures" for f in first["files"]) and len(set(first["files"] + again["files"])) == 4
    assert "<lora:robot:0.5>" in first["parameters"][0] and "Seed: 6" in first["parameters"][1]
    for deltas, extra, message in (
        ({"nobody": 1.0}, {}, 'no delta "nobody" in the library'),
        ({"../base/unet/diffusion_pytorch_model": 1.0}, {}, "no delta"),
        ({"robot": "much"}, {}, "expected a number"),
        ({"robot": 1e9}, {}, "strength of"),
        ({}, {"steps": 10**9}, "steps = 1000000000"),
        ({}, {"width": 10**6}, "width"),
        ({}, {"base": "/etc"}, 'unknown setting "base"'),
        ({}, {"steps": "2"}, "a whole number"),
    ):
        with pytest.raises(AppError, match=message):
            client.predict("a toy", deltas, extra, api_name="/draw")
    assert client.predict(api_name="/training")["running"] in (True, False)


def test_large_uploads_are_refused_and_small_ones_not_readable_as_pages(address: str, tmp_path: Path) -> None:
    import httpx

    large = httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.png", b"x" * 2_000_000)})
    assert large.status_code == 413
    small = httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.html", b"<script>window.__xss=1</script>")})
    shown = httpx.get(f"{address}/gradio_api/file={small.json()[0]}")
    assert shown.headers.get("content-disposition", "").startswith("attachment") or shown.status_code >= 400


def test_the_embedded_base_comes_with_examples_which_fit_it(tmp_path: Path) -> None:
    examples = find(Settings(base="toybox", runs=tmp_path).folders)
    assert {found.name for found in examples} == {"robot", "mug", "toon"}
    assert find(Settings(base="other", runs=tmp_path).folders) == []
    assert all(misfit(open_header(found.path), vgm_peft.load("toybox")) == "" for found in examples)


def test_a_public_address_needs_a_password(capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("0.0.0.0", "192.168.1.5", "::", "studio.example.org"):
        with pytest.raises(ConfigError, match="can be reached from other machines"):
            Settings(host=host)
    assert main("studio", ["--host", "0.0.0.0"]) == 2
    assert "--auth USER:PASSWORD" in capsys.readouterr().err
    assert main("studio", ["--library", "/nowhere/at/all"]) == 2
    with pytest.raises(ConfigError):
        parse_auth("me:short")
    assert "0.0.0.0" in Settings(host="0.0.0.0", auth=parse_auth("me:long enough")).hosts
    assert Settings().hosts == {"localhost", "127.0.0.1", "[::1]"}


def test_the_password_is_asked_for(home: Path) -> None:
    from vgm_peft.studio.app import build

    studio = build(Settings(base=str(home / "base"), runs=home / "r2", pictures=home / "p2", port=0, auth=("me", "password")))
    studio.engine.warm_up = lambda: None  # type: ignore[method-assign]
    studio.launch(block=False)
    try:
        address = f"http://127.0.0.1:{studio.page.server_port}"
        assert ask(address, "/config").status == 401 and ask(address, "/gradio_api/info").status == 401
    finally:
        studio.page.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_bytes(b""), "not a readable picture"),
        (lambda p: p.write_bytes(b"%PDF-1.4"), "not a readable picture"),
        (lambda p: Image.new("RGB", (8, 8)).save(p), "at least 16 a side"),
        (lambda p: Image.new("1", (8100, 8000)).save(p), "pixels"),
        (lambda p: Image.new("RGB", (64, 64)).save(p, format="TIFF"), "not a readable picture"),
    ],
)
def test_uploads_are_all_kept_or_none(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "good.png")
    make(tmp_path / "bad.png")
    with pytest.raises(DataError, match=rf"bad\.png.*{message}"):
        keep_pictures([str(tmp_path / "good.png"), str(tmp_path / "bad.png")], tmp_path / "kept", 10)
    assert not (tmp_path / "kept").exists()
    with pytest.raises(DataError, match="at most 1"):
        keep_pictures([str(tmp_path / "good.png")] * 2, tmp_path / "kept", 1)
    assert keep_pictures([str(tmp_path / "good.png")] * 2, tmp_path / "kept", 2) == 2


@pytest.mark.parametrize(
    "wish",
    [
        {"name": "../x"},
        {"name": "--set"},
        {"name": ""},
        {"name": "a/b"},
        {"name": "x" * 41},
        {"class_prompt": " "},
        {"class_prompt": "a\nb"},
        {"token": "two words"},
        {"steps": 0},
        {"steps": 10**9},
        {"allow": ("everything",)},
        {"allow": ("tiny", "--set=x")},
        {"task": "nothing"},
        {"task": "controlnet", "annotator": "depth"},
    ],
)
def test_wishes_out_of_range_are_refused(wish: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Wish(**{"name": "x", "class_prompt": "a toy", "steps": 5, **wish})


def test_faults_are_allowed_by_the_same_words(studio: "Studio", tmp_path: Path) -> None:
    """The page offers them as the command explains them, and a training is told of them."""
    from vgm_peft.cli import Parser
    from vgm_peft.cli.train import add_flags
    from vgm_peft.config import merge, parse_setting
    from vgm_peft.data import KINDS
    from vgm_peft.train.config import bind

    boxes = [c for c in studio.page.get_config_file()["components"] if c["props"].get("elem_id") == "train-allow"]
    assert [choice for choice, _ in boxes[0]["props"]["choices"]] == [f"{kind}: {KINDS[kind]}" for kind in ALLOWED]
    wish = Wish(name="two alike", class_prompt='a "toy" = --set', steps=2, token="-x", allow=("duplicate", "tiny"))
    table = wish.table("toybox", tmp_path, tmp_path / "run")
    add_flags(parser := Parser())
    flags = parser.parse_args(wish.flags(table, tmp_path / "some.toml"))
    assert (flags.task, flags.recipe) == ("dreambooth", str(tmp_path / "some.toml"))
    assert merge(*map(parse_setting, flags.set)) == table  # whatever the texts hold
    assert bind(table).data.allow == ("duplicate", "tiny")


def test_a_failing_training_says_why_and_a_name_in_use_is_refused(studio: "Studio", tmp_path: Path) -> None:
    with pytest.raises(TrainError, match='a run named "robot" exists'):
        studio.desk.start(Wish(name="robot", class_prompt="a toy", steps=2), [])
    with pytest.raises(DataError, match="no pictures yet"):
        studio.desk.start(Wish(name="new", class_prompt="a toy", steps=2), [])
