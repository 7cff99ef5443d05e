"""Promises about images from URLs: off unless allowed, public addresses alone, bounded.

The servers are on the loopback, which only an injected function allows.
"""

import datetime
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_vlm_prune import Chat, batch_generate, generate, load
from mlx_vlm_prune.chat import main as chat_main
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.evaluation.questions import BadRecords, Source, format_of
from mlx_vlm_prune.explore import main as explore_main
from mlx_vlm_prune.generate import main
from mlx_vlm_prune.inputs import image_urls
from mlx_vlm_prune.inputs.image import open_image
from mlx_vlm_prune.inputs.image_urls import download, is_public

from .image_site import PICTURE, Server, serving
from .test_image import noise

UNVERIFIED = r"cannot download .*certificate verify failed"
QUESTION = "Is there a red star?"


def on_loopback(address: Any) -> bool:
    return address.is_loopback


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def site(server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def allowed(monkeypatch) -> None:
    monkeypatch.setattr(image_urls, "is_public", on_loopback)


@pytest.fixture(scope="module")
def scenes():
    return load()


PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
NOT_PUBLIC = """
    127.0.0.1 127.8.8.8 0.0.0.0 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1
    224.0.0.1 239.255.255.250 255.255.255.255 240.0.0.1 192.0.2.1 198.18.0.1
    :: ::1 fe80::1 fe80::1%1 fc00::1 fd00:ec2::254 ff02::1 2001:db8::1 ::127.0.0.1
    ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:224.0.0.1 2002:7f00:1::
    64:ff9b::7f00:1 64:ff9b::a00:1 64:ff9b:1::1 2001::1
""".split()


@pytest.mark.parametrize("address", [*PUBLIC, *NOT_PUBLIC])
def test_which_addresses_are_public(address):
    assert is_public(ipaddress.ip_address(address)) is (address in PUBLIC)


HERE = "127.0.0.1 127.1 2130706433 0x7f000001 0177.0.0.1 0.0.0.0 [::1] [::ffff:127.0.0.1] localhost"


@pytest.mark.parametrize("host", HERE.split())
def test_no_way_of_writing_this_machine_is_connected_to(server, host):
    before = len(server.requests)
    with pytest.raises(
        UserError, match=r"leads to .*, which is not a public address; download the"
    ):
        download(f"http://{host}:{server.server_port}/a.png")
    assert len(server.requests) == before


@pytest.mark.parametrize("path", ["a.png", "a.png?size=full#top", "moved", "café.png"])
def test_a_picture_is_downloaded_along_redirects(site, path):
    content = download(f"{site}/{path}", on_loopback)
    assert content == PICTURE
    assert content.name == f"{site}/{path}".split("?")[0].replace("é", "%C3%A9")


def test_each_hop_is_resolved_once_and_all_its_addresses_are_checked(server):
    resolved = []

    def resolve(host: str, port: int) -> list[str]:
        resolved.append(host)
        return {"outside.example": ["127.0.0.1"], "inside.example": ["127.0.0.1", "10.0.0.7"]}[host]

    before = len(server.requests)
    with pytest.raises(UserError, match=r"/named leads to 10\.0\.0\.7, which is not a public"):
        download(f"http://outside.example:{server.server_port}/named", on_loopback, resolve)
    assert resolved == ["outside.example", "inside.example"]
    [(path, headers)] = server.requests[before:]
    assert path == "/named" and headers["Host"] == f"outside.example:{server.server_port}"


def test_a_name_that_turns_to_another_address_is_connected_to_where_it_was_checked(server):
    answers = iter([["127.0.0.1"], ["10.0.0.7"]])
    url = f"http://turning.example:{server.server_port}/a.png"
    assert download(url, on_loopback, lambda host, port: next(answers)) == PICTURE


BAD = {
    "missing": "/missing answers with status 404",
    "loop": "/loop redirects more than 5 times",
    "private": "/private leads to 10.0.0.1, which is not a public address",
    "file": "file:///etc/passwd is no http or https URL with a host",
    "large": "/large has more than the 50 MB allowed",
    "endless": "/endless has more than the 50 MB allowed",
    "cut-off": "/cut-off ended ",
    "slow-head": "/slow-head took more than the 0.5 seconds allowed",
    "slow-body": "/slow-body took more than the 0.5 seconds allowed",
}


@pytest.mark.parametrize("path", BAD)
def test_every_fault_is_one_sentence_and_ends_in_time(site, path, monkeypatch):
    seconds = 0.5 if path.startswith("slow") else 10.0
    threads = threading.active_count()
    begin = time.perf_counter()
    with pytest.raises(UserError) as caught:
        download(f"{site}/{path}?key=secret", on_loopback, seconds=seconds)
    assert BAD[path] in str(caught.value) and "secret" not in str(caught.value)
    assert time.perf_counter() - begin < 5
    if path.startswith("slow"):  # nothing of ours goes on
        time.sleep(0.3)
        names = [thread.name for thread in threading.enumerate()]
        assert not [name for name in names if name.endswith(path)], threads


def test_a_resolver_that_hangs_is_not_waited_for(site):
    release = threading.Event()
    with pytest.raises(UserError, match=r"took more than the 0\.2 seconds allowed"):
        download("http://a.example/", on_loopback, lambda *_: release.wait(9) and [], 0.2)
    release.set()


REFUSED = {
    "ftp://a.example/a.png": "ftp://a.example/a.png is no http or https URL",
    "http:///a.png": "http:///a.png is no http or https URL with a host",
    "http://[::1": "is no http or https URL with a host",
    "http://a.example:99999/": "is no http or https URL with a host",
    "http://me:word@a.example/": "http://a.example/ holds a user name or a password",
    "http://a.example/\r\nX: y": "cannot download http://a.example/",
    "http://nowhere.invalid/": "cannot download http://nowhere.invalid/: ",
    f"http://a.example/{'a' * 999}": "cannot download http://a.example/aaa",
}


@pytest.mark.parametrize("url", REFUSED)
def test_what_is_no_url_of_a_picture_is_refused_shortly(url):
    with pytest.raises(UserError) as caught:
        download(url, on_loopback, resolve=lambda host, port: [])
    text = str(caught.value)
    assert REFUSED[url] in text and len(text) < 200 and text.isprintable()
    assert "word" not in text.replace("password", "")


def test_without_a_word_no_url_is_opened(scenes, site, server):
    before, url = len(server.requests), f"{site}/a.png?key=secret"
    ways = [
        lambda: generate(*scenes, QUESTION, url),
        lambda: batch_generate(*scenes, [QUESTION], [[url]]),
        lambda: Chat(*scenes).ask(QUESTION, url),
    ]
    for way in ways:
        with pytest.raises(UserError, match="is a URL; set allow_url, or download the image"):
            way()
    with pytest.raises(UserError, match="is a URL; download the image and give its path"):
        open_image(url)
    with pytest.raises(UserError, match="allow_url is 'yes'; it must be True or False"):
        generate(*scenes, QUESTION, allow_url="yes")
    assert len(server.requests) == before


def test_every_way_in_takes_an_allowed_url(scenes, site, allowed):
    options = {"max_tokens": 2, "allow_url": True}
    expected = generate(*scenes, QUESTION, PICTURE, max_tokens=2)
    for answer in (
        generate(*scenes, QUESTION, f"{site}/moved", **options),
        *batch_generate(*scenes, [QUESTION], [[f"{site}/a.png"]], **options),
        Chat(*scenes, **options).ask(QUESTION, f"{site}/a.png"),
    ):
        assert answer.token_ids == expected.token_ids
    with pytest.raises(UserError, match=re.escape(f"{site}/text is not a PNG, JPEG")):
        generate(*scenes, QUESTION, f"{site}/text?key=secret", **options)


def test_an_allowed_url_must_be_public(scenes, site):
    with pytest.raises(UserError, match=r"leads to 127\.0\.0\.1, which is not a public address"):
        generate(*scenes, QUESTION, f"{site}/a.png", allow_url=True)


def test_the_command_lines_take_urls_where_the_flag_is_given(
    server, site, allowed, capsys, monkeypatch
):
    words = ["--image", f"{site}/a.png", "--max-tokens", "2"]
    before = len(server.requests)
    main([*words, "--prompt", QUESTION, "--allow-url", "--pruner", "norm", "--compare"])
    assert len(server.requests) == before + 1  # for three answers
    lines = [f"/image {site}/moved", QUESTION]
    monkeypatch.setattr("sys.stdin", iter(lines))
    monkeypatch.setattr("mlx_vlm_prune.chat.piped_lines", lambda: iter(lines))
    monkeypatch.setattr("mlx_vlm_prune.chat.sys.stdin", type("Pipe", (), {"isatty": bool})())
    chat_main([*words, "--allow-url"])
    captured = capsys.readouterr()
    assert f"The next question is about {site}/moved." in captured.out
    prompt = ["--prompt", QUESTION]
    for command, more in ((main, prompt), (explore_main, prompt), (chat_main, [])):
        with pytest.raises(SystemExit) as stop:
            command([*words, *more])
        assert stop.value.code == 2
        assert "is a URL; set --allow-url, or download the image" in capsys.readouterr().err


def test_a_question_about_a_url_is_refused_with_what_to_do(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"image": "https://a.example/a.png?k=1", "question": "Q", "answer": "A"}\n')
    with pytest.raises(UserError, match=r"line 1: https://a\.example/a\.png is a URL; download"):
        list(format_of("own").read(Source(file), BadRecords()))


def certificate(folder: Path, name: str) -> tuple[Path, ssl.SSLContext]:
    """A certificate that signs itself, for `name`, and a server's context with it."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime(2020, 1, 1)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), 1)
    builder = builder.not_valid_before(now).not_valid_after(now.replace(year=2090))
    names = x509.SubjectAlternativeName([x509.DNSName(name)])
    signed = builder.add_extension(names, False).sign(key, hashes.SHA256())
    public, both = folder / "public.pem", folder / "both.pem"
    public.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    form = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    private = key.private_bytes(serialization.Encoding.PEM, *form)
    both.write_bytes(public.read_bytes() + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)
    return public, context


def test_https_is_verified_by_the_name_in_the_url(tmp_path, monkeypatch):
    public, context = certificate(tmp_path, "good.example")

    def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    with serving(context) as server:
        end = f"{server.server_port}/a.png"
        with pytest.raises(UserError, match=UNVERIFIED):
            download(f"https://good.example:{end}", on_loopback, resolve)
        monkeypatch.setenv("SSL_CERT_FILE", str(public))
        assert download(f"https://good.example:{end}", on_loopback, resolve) == PICTURE
        with pytest.raises(UserError, match=UNVERIFIED):
            download(f"https://other.example:{end}", on_loopback, resolve)
        with pytest.raises(UserError, match="cannot download"):
            download(f"http://good.example:{end}", on_loopback, resolve)


def test_where_the_system_has_no_certificates_those_of_certifi_are_trusted(tmp_path, monkeypatch):
    """As in Python from python.org on macOS."""
    certifi = pytest.importorskip("certifi", reason="certifi is not installed")
    public, context = certificate(tmp_path, "good.example")
    monkeypatch.setattr(certifi, "where", lambda: str(public))
    with serving(context) as server:
        url = f"https://good.example:{server.server_port}/a.png"
        with pytest.raises(UserError, match=UNVERIFIED):
            download(url, on_loopback, lambda host, port: ["127.0.0.1"])
        nowhere = ssl.get_default_verify_paths()._replace(cafile=None, capath=None)
        monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: nowhere)
        assert download(url, on_loopback, lambda host, port: ["127.0.0.1"]) == PICTURE


def test_an_address_that_does_not_answer_leaves_time_for_the_next(server, monkeypatch):
    waits, connected = [], []
    stock = socket.create_connection

    def connect(place: tuple[str, int], seconds: float) -> socket.socket:
        waits.append(seconds)
        if place[0] == "127.0.0.2":
            raise TimeoutError("timed out")
        connected.append(stock(place, seconds))
        return connected[-1]

    monkeypatch.setattr(socket, "create_connection", connect)
    url = f"http://two.example:{server.server_port}/a.png"
    for seconds, wait in ((6.0, 3.0), (30.0, 5.0)):
        addresses = ["127.0.0.2", "127.0.0.1"]
        assert download(url, on_loopback, lambda *_, a=addresses: a, seconds) == PICTURE
        assert waits[-2:] == [wait, wait]


def test_the_picture_is_what_the_server_has(site):
    picture = open_image(download(f"{site}/a.png", on_loopback))
    np.testing.assert_array_equal(np.asarray(picture), noise())
