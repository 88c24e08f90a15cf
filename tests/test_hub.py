"""A hub that cannot be reached is said so at once; proxies, caches and a hub that answers hold."""

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from robust_accel.data.sources import load_splits
from robust_accel.hub import asked_in_vain_once
from robust_accel.models import ModelSettings, create_classifier

COMMIT = "0" * 40
NOWHERE = "http://127.0.0.1:9"  # the port at which nothing is told


@pytest.fixture(autouse=True)
def waited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[float]]:
    """Seconds that anybody would have slept, with empty caches and a client of each test's own."""
    if not hasattr(huggingface_hub, "set_client_factory"):
        pytest.skip("this huggingface_hub does not ask again")
    seconds: list[float] = []
    sleep, own = time.sleep, threading.get_ident()

    def wait(duration: float) -> None:  # threads that other tests have left go on as they did
        (seconds.append if threading.get_ident() == own else sleep)(duration)

    monkeypatch.setattr(time, "sleep", wait)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub_at(NOWHERE, monkeypatch)
    yield seconds
    huggingface_hub.close_session()


def hub_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
    huggingface_hub.close_session()


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """Has nothing; its address, and what it is asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_GET = do_HEAD

        def log_message(self, *_: Any) -> None:
            pass

    own = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=own.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{own.server_port}", asked
    own.shutdown()
    own.server_close()


def test_data_that_are_nowhere_are_one_sentence_at_once(waited: list[float]) -> None:
    sentence = (
        rf"^path: 'no/such_data' cannot be loaded \(no such local path, so the hub was asked\): "
        rf"ConnectionError: {NOWHERE} cannot be reached \(\[Errno \d+\] Connection refused\), and "
        r"what was wanted is in no cache$"
    )
    with pytest.raises(ValueError, match=sentence):
        load_splits("no/such_data", None)
    assert sum(waited) < 4


@pytest.mark.parametrize("path", ["/nowhere", "./nowhere", "../no/where", "images/of/mine"])
def test_a_path_that_is_no_name_of_the_hubs_is_not_asked_for_there(
    waited: list[float], path: str
) -> None:
    with pytest.raises(ValueError, match=rf"^path: '{path}' cannot be loaded: there is no such f"):
        load_splits(path, None)
    assert not waited


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "hf-hub:no/such_model"])
def test_a_model_that_is_nowhere_is_one_sentence_at_once(waited: list[float], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^name: '{name}' .* {NOWHERE} cannot be reached \("):
        create_classifier(ModelSettings(name=name, pretrained=True))
    assert sum(waited) < 4


def test_what_is_in_the_cache_needs_no_hub(tmp_path: Path) -> None:
    kept = tmp_path / "hub" / "models--a--b"
    file = kept / "snapshots" / COMMIT / "config.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(COMMIT)
    hooks = get_session().event_hooks
    with asked_in_vain_once():
        found = huggingface_hub.hf_hub_download("a/b", "config.json")
    assert Path(found) == file
    assert get_session().event_hooks == hooks


def test_what_fails_without_the_hub_is_said_with_it() -> None:
    @asked_in_vain_once()
    def fails(*, asks: bool) -> None:
        with suppress(OfflineModeIsEnabled):
            if asks:
                get_session().head(NOWHERE)
        raise ValueError("no config x")

    with pytest.raises(ConnectionError, match=rf"^{NOWHERE} cannot .*, and without it: no config"):
        fails(asks=True)
    with pytest.raises(ValueError, match=r"^no config x$"):
        fails(asks=False)


def test_a_hub_that_answers_is_asked(
    server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, waited: list[float]
) -> None:
    hub_at(server[0], monkeypatch)
    with pytest.raises(ValueError, match="path: 'no/such_data' cannot be loaded") as error:
        load_splits("no/such_data", None)
    assert "cannot be reached" not in str(error.value)
    assert any("no/such_data" in path for path in server[1])
    assert waited == []


def test_a_proxy_is_asked_for_the_hub(
    server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, waited: list[float]
) -> None:
    monkeypatch.setenv("HTTP_PROXY", server[0])
    hub_at("http://hub.invalid", monkeypatch)
    with asked_in_vain_once():
        assert get_session().head("http://hub.invalid/a").status_code == 404
    assert [path.rstrip("/") for path in server[1]] == [
        "http://hub.invalid",
        "http://hub.invalid/a",
    ]
    assert waited == []


def test_a_short_fault_is_waited_for(monkeypatch: pytest.MonkeyPatch, waited: list[float]) -> None:
    client, answers = get_session(), [None]
    real = client.head

    def head(*args: Any, **settings: Any) -> Any:
        return answers.pop() if waited else real(*args, **settings)

    monkeypatch.setattr(client, "head", head)
    hooks = client.event_hooks
    with asked_in_vain_once():
        assert client.event_hooks == hooks
    assert len(waited) == 1


def test_who_is_offline_by_choice_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, waited: list[float]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="path: 'no/such_data' cannot be loaded"):
        load_splits("no/such_data", None)
    assert waited == []
