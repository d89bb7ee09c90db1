"""Single files of a store: found, read, written, tried again, and given up in the stated time."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from server import Server

from vitlab.config import UserError
from vitlab.data.stores.patience import Attempt, patiently
from vitlab.data.stores.remote import (
    Missing,
    Patience,
    download,
    exists,
    is_url,
    join,
    local_path,
    read_bytes,
    shown,
    upload,
)

CALM = Patience(retries=2, stall=5, first_wait=0.05)
QUICK = Patience(retries=2, stall=0.3, first_wait=0.05)  # where silence is meant
BODY = bytes(range(256)) * 400


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


# ---------------------------------------------------------------- addresses


def test_what_is_an_address() -> None:
    assert [is_url(text) for text in ("https://a/b", "s3://bucket/x", "memory://x", "S3://b")] == [True] * 4
    assert [is_url(text) for text in ("/a/b", "a", "file:///a", "hf:name", "C:/x", "a/b://c")] == [False] * 6
    assert (
        local_path("file:///a/b") == local_path("file://localhost/a/b") == local_path("/a/b") == Path("/a/b")
    )


def test_a_name_goes_before_the_query() -> None:
    assert join("https://h/shards/", "a.tar") == "https://h/shards/a.tar"
    assert join("https://h/shards?sig=1", "a.tar") == "https://h/shards/a.tar?sig=1"
    assert join("s3://bucket/what?", "a.tar") == "s3://bucket/what?/a.tar"


def test_no_secret_is_shown() -> None:
    text = "ClientError: 403, url='https://me:pw@h/a.tar?sig=secret#x' and s3://key:pw@b/c?v=1"
    assert shown(text) == "ClientError: 403, url='https://h/a.tar' and s3://b/c"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        (
            "htps://h/a?sig=1",
            "htps://h/a: unknown kind of address 'htps'; allowed: a path, or an address with https://, "
            "http://, s3://, gs://, memory://, file:// or another protocol of fsspec; did you mean 'https'?",
        ),
        ("http://[h/a", "http://[h/a: ValueError: Invalid IPv6 URL; check the address and the credentials"),
    ],
)
def test_an_address_that_cannot_be(url: str, text: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
        exists(url, CALM)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def absent(scheme: str) -> None:
        raise ImportError(f"Install what {scheme} needs")

    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)
    with pytest.raises(UserError) as caught:
        exists("s3://bucket/a", CALM)
    assert (
        str(caught.value) == "s3://bucket/a: s3:// needs a package that is not here: pip install vitlab[s3]"
    )
    with pytest.raises(UserError, match=r"ImportError: Install what gs needs$"):
        exists("gs://bucket/a", CALM)


# ---------------------------------------------------------------- reading and writing


def test_a_store_in_memory(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BODY)
    url = f"memory://{tmp_path.name}/b/a"
    assert not exists(url, CALM)
    upload(tmp_path / "a", url, CALM)
    assert exists(url, CALM)
    assert read_bytes(url, CALM) == BODY
    with pytest.raises(Missing, match=r"c: no such file$"):
        read_bytes(f"memory://{tmp_path.name}/c", CALM)


def test_a_web_server(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(BODY[:-3])
    with Server({"a": BODY}) as server:
        assert read_bytes(f"{server.url}/a", CALM) == BODY
        assert (exists(f"{server.url}/a?x=1", CALM), exists(f"{server.url}/b", CALM)) == (True, False)
        upload(tmp_path / "b", f"{server.url}/b", CALM)
        assert server.files["b"] == BODY[:-3]
        assert exists(f"{server.url}/b", CALM)
        with pytest.raises(UserError, match=r"/none/b: no such bucket or folder to write to; make it first$"):
            upload(tmp_path / "b", f"{server.url}/none/b", CALM)


def test_a_missing_file_is_final() -> None:
    with Server({}) as server:
        with pytest.raises(Missing) as caught:
            read_bytes(f"{server.url}/a?sig=secret", CALM)
        assert str(caught.value) == f"{server.url}/a: no such file"
        assert server.total == 1


def test_a_refusal_is_final() -> None:
    with Server({"a": BODY}, lambda number, name: "403") as server:
        with pytest.raises(UserError) as caught:
            read_bytes(f"{server.url}/a?sig=secret", CALM)
        assert (
            str(caught.value) == f"{server.url}/a: HTTP 403 Forbidden; check the address and the credentials"
        )
        assert server.total == 1


def test_a_store_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    import http.server

    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    site.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=site.serve_forever, args=(0.02,), daemon=True).start()
    try:
        with pytest.raises(UserError, match=r"this store cannot be written to; choose another, as"):
            upload(tmp_path / "a", f"http://127.0.0.1:{site.server_port}/a", CALM)
    finally:
        site.shutdown()
        site.server_close()


# ---------------------------------------------------------------- trouble


def faults(number: int, name: str) -> str:
    """Every tenth request is met with silence, every third fails, in one of two ways."""
    if number % 10 == 0:
        return "silent"
    return "well" if number % 3 else ("500" if number % 2 else "drop")


def test_all_files_arrive_whole_from_a_bad_server(tmp_path: Path) -> None:
    files = {f"{i}.tar": hashlib.sha256(bytes([i])).digest() * 10_000 for i in range(16)}
    with Server(files, faults) as server:
        for name, body in files.items():
            part = download(f"{server.url}/{name}", tmp_path / name, Patience(6, 0.6, 0.05), size=len(body))
            assert part.read_bytes() == body
        assert 20 < server.total < 40
        assert server.total == sum(faults(i, "") != "well" for i in range(1, server.total + 1)) + len(files)
    assert len(list(tmp_path.iterdir())) == len(files)  # nothing is left of the tries that failed


def timed(work: Callable[[], object]) -> tuple[str, float]:
    begin = time.monotonic()
    with pytest.raises(UserError) as caught:
        work()
    return str(caught.value), time.monotonic() - begin


def test_a_silent_server_is_given_up_in_the_stated_time() -> None:
    assert QUICK.longest == pytest.approx(3 * 0.3 + 0.05 + 0.1)
    with Server({"a": BODY}, lambda number, name: "silent") as server:
        text, took = timed(lambda: read_bytes(f"{server.url.replace('//', '//me:pw@')}/a?sig=secret", QUICK))
    assert re.fullmatch(
        rf"{server.url}/a: given up after 3 tries in [12]\.\d+ s, at last: no byte for 0\.3 s; "
        "see whether the store can be reached, then start again: what is done is kept",
        text,
    )
    assert QUICK.longest <= took < 2 * QUICK.longest
    assert server.total == 3


def test_a_server_that_is_gone() -> None:
    with Server({}) as server:
        pass
    for ask in (exists, read_bytes):
        text, took = timed(lambda ask=ask: ask(f"{server.url}/a", CALM))  # type: ignore[misc]
        assert "given up after 3 tries" in text
        assert "Cannot connect to host" in text
        assert took < 2


def test_the_pauses_grow_up_to_a_bound() -> None:
    assert Patience(9).waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert Patience().longest == 7 * 20 + 31.5


def test_a_slow_server_is_no_silent_one(tmp_path: Path) -> None:
    with Server({"a": BODY}, lambda number, name: "slow") as server:
        begin = time.monotonic()
        assert read_bytes(f"{server.url}/a", Patience(0, stall=0.6)) == BODY
        assert time.monotonic() - begin > 0.8


def test_a_busy_server_is_asked_again() -> None:
    with Server(
        {"a": BODY}, lambda number, name: "well" if number == 3 else ["429", "503"][number - 1]
    ) as server:
        assert read_bytes(f"{server.url}/a", CALM) == BODY
        assert server.total == 3


def test_wrong_bytes_are_fetched_again(tmp_path: Path) -> None:
    right = hashlib.sha256(BODY).hexdigest()
    with Server({"a": BODY}, lambda number, name: "wrong" if number < 3 else "well") as server:
        part = download(f"{server.url}/a", tmp_path / "a", CALM, size=len(BODY), sha256=right)
        assert part.read_bytes() == BODY
        assert server.total == 3
        text, _ = timed(lambda: download(f"{server.url}/a", tmp_path / "b", CALM, sha256="0" * 64))
        assert f"the bytes have sha256 {right[:12]}…, in the index it is 000000000000…; see whether" in text
        assert server.total == 6
        text, _ = timed(lambda: download(f"{server.url}/a", tmp_path / "b", CALM, size=7))
        assert f"{len(BODY)} bytes came, 7 are in the index" in text
    assert list(tmp_path.iterdir()) == [part]


def test_what_is_left_behind_writes_nowhere(tmp_path: Path) -> None:
    """The first try stands still in mid-body and goes on, with other bytes, after the second is done."""
    with Server({"a": BODY}, lambda number, name: "late" if number == 1 else "well") as server:
        part = download(f"{server.url}/a", tmp_path / "a", QUICK)
        left = [thread for thread in threading.enumerate() if thread.name == "transfer"]
        assert len(left) == 1
        server.wake.set()
        left[0].join(5)
        assert not left[0].is_alive()
    assert part.read_bytes() == BODY
    assert list(tmp_path.iterdir()) == [part]


def test_a_full_disk_is_not_the_stores_fault(tmp_path: Path) -> None:
    def get(_: Attempt) -> None:
        raise OSError(28, "No space left on device")

    text, took = timed(lambda: patiently("memory://a", CALM, get))
    assert text == (
        "memory://a: [Errno 28] No space left on device; make room on this machine or choose another folder"
    )
    assert took < 0.05
