"""Names of public pipelines: the table, the cache, COURSE_SD, and what is said where the hub does not answer or refuses.

No test asks the real hub: its address is replaced by one on this machine.
"""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import diffusers
import huggingface_hub
import pytest
from huggingface_hub import constants

from course_lib import zoo
from course_lib.zoo import hub
from tests import pipelines

SHA = "a" * 40
NAME, HUB_ID = "stable-diffusion-1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, no COURSE_SD, and a hub at an address where nothing listens."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("COURSE_SD", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    return tmp_path / "cache"


def put_into(cache, hub_id):
    """A tiny pipeline in the cache, as a download leaves it; returns its folder."""
    repo = cache / f"models--{hub_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(SHA)
    folder = repo / "snapshots" / SHA
    pipelines.stable_diffusion().save_pretrained(folder)
    return folder


def refused(name, *said):
    with pytest.raises(zoo.ZooError) as info:
        zoo.load(name, device="cpu")
    message = str(info.value)
    assert "\n" not in message
    for words in said:
        assert words in message, message


# --- the table ---------------------------------------------------------------------------------------------------------


def test_the_table():
    table = hub.table()
    assert {"stable-diffusion-1.5", "stable-diffusion-2.1", "stable-diffusion-xl", "stable-diffusion-3", "ddpm-cifar10"} <= set(
        table
    )
    for name, entry in table.items():
        assert hub.HUB_ID.fullmatch(entry.hub_id) and not hub.HUB_ID.fullmatch(name)
        assert name not in zoo.RECIPES
        assert entry.stand_in == {"text-to-image": "mini-sd", "unconditional": "digits"}[entry.kind]
        assert zoo.stand_in(name) == zoo.stand_in(entry.hub_id) == entry.stand_in
        assert entry.what and entry.licence
        assert hub.find(name) is hub.find(entry.hub_id) is entry
    assert len({entry.hub_id for entry in table.values()}) == len(table)
    assert [name for name, entry in table.items() if entry.gated] == ["stable-diffusion-3"]
    assert zoo.stand_in("somebody/else") == "mini-sd"
    with pytest.raises(zoo.ZooError, match="model = 'digitz' is no public pipeline; expected a hub id or one of stable"):
        zoo.stand_in("digitz")


# --- on this machine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NAME, HUB_ID])
def test_the_cache_is_enough(name, cache):
    assert not zoo.available(name)
    put_into(cache, HUB_ID)
    assert zoo.available(name)
    assert zoo.load(name, device="cpu").name == name


def test_a_download_that_was_broken_off_is_not_available(cache):
    """The hub is asked for the rest; where it does not answer, that is said."""
    folder = put_into(cache, HUB_ID)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    assert not zoo.available(NAME)
    refused(NAME, "there is no network")


def test_course_sd_is_a_folder(tmp_path, monkeypatch):
    """It replaces every text-to-image model of the table, by short name and by id, and nothing else."""
    pipelines.stable_diffusion("v_prediction").save_pretrained(tmp_path / "tiny")
    monkeypatch.setenv("COURSE_SD", str(tmp_path / "tiny"))
    for short, entry in hub.table().items():
        for name in (short, entry.hub_id):
            assert zoo.available(name) == (entry.kind == "text-to-image")
    model = zoo.load(NAME, device="cpu")
    assert model.name == NAME and model.scheduler.config.prediction_type == "v_prediction"
    refused("ddpm-cifar10", "google/ddpm-cifar10-32", "no network", "zoo.load('digits')")
    refused("somebody/other", "somebody/other")


def test_course_sd_is_a_name(cache, monkeypatch):
    for name, hub_id in (
        ("somebody/tiny", "somebody/tiny"),
        ("stable-diffusion-2.1", hub.table()["stable-diffusion-2.1"].hub_id),
    ):
        monkeypatch.setenv("COURSE_SD", name)
        assert not zoo.available(NAME)
        put_into(cache, hub_id)
        assert zoo.available(NAME)
        assert zoo.load(NAME, device="cpu").shape == (4, 8, 8)


def test_course_sd_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_SD", str(tmp_path / "absent"))
    assert not zoo.available(NAME)
    refused(NAME, "COURSE_SD = ", "is a path where no folder is")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("COURSE_SD", str(tmp_path / "empty"))
    assert not zoo.available(NAME)
    refused(NAME, "is no pipeline: it has no model_index.json")


# --- the hub does not answer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hub_id", "stand_in"),
    [
        (NAME, HUB_ID, "zoo.load('mini-sd')"),
        ("ddpm-cifar10", "google/ddpm-cifar10-32", "zoo.load('digits')"),
        ("google/ddpm-cifar10-32", "google/ddpm-cifar10-32", "zoo.load('digits')"),
        ("somebody/something", "somebody/something", "zoo.load('mini-sd') for text to image, zoo.load('digits')"),
    ],
)
def test_no_network(name, hub_id, stand_in):
    start = time.monotonic()
    refused(name, hub_id, "not on this machine, and there is no network", stand_in)
    assert time.monotonic() - start < hub.PROBE_SECONDS


def test_a_network_that_swallows_everything(monkeypatch):
    """A connection that is taken and never answered ends after PROBE_SECONDS, not after many attempts."""
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        refused(NAME, "there is no network")
        assert 0.4 < time.monotonic() - start < 5  # one attempt, where a download makes five or more


def test_offline_by_choice(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: pytest.fail("the network was used"))
    refused(NAME, "HF_HUB_OFFLINE forbids the network", "zoo.load('mini-sd')")


# --- the hub answers -----------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for: facts, the list of files and the files; or a refusal of everything."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, root, headers = self.path.split("?")[0], self.server.root, {}
        if self.server.refusal:
            (status, headers), body = self.server.refusal, b""
        else:
            files = {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}
            names = {name: hashlib.sha1(data).hexdigest() for name, data in files.items()}
            if "/resolve/" in path:
                name = path.split(f"/resolve/{SHA}/")[-1]
                if name in files:
                    status, headers, body = 200, {"ETag": f'"{names[name]}"', "X-Repo-Commit": SHA}, files[name]
                else:
                    status, headers, body = 404, {"X-Error-Code": "EntryNotFound"}, b""
            elif "/tree/" in path:
                facts = [{"type": "file", "path": n, "size": len(files[n]), "oid": oid} for n, oid in names.items()]
                status, body = 200, json.dumps(facts).encode()
            else:
                facts = {"id": HUB_ID, "sha": SHA, "siblings": [{"rfilename": name} for name in files]}
                status, body = 200, json.dumps(facts).encode()
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextlib.contextmanager
def serving(root=None, refusal=None):
    """The address of a hub whose only model has the files under `root`, or that answers `refusal` = (status, headers)."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.root, server.refusal = root, refusal
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "GatedRepo", "is gated; accept its licence at https://huggingface.co/stabilityai/"),
        (401, "RepoNotFound", "does not exist, is private or was withdrawn"),
        (404, "RepoNotFound", "does not exist, is private or was withdrawn"),
        (500, "", "was refused by the hub"),
    ],
)
def test_the_hub_refuses(status, code, said, monkeypatch):
    with serving(refusal=(status, {"X-Error-Code": code})) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        refused("stable-diffusion-3", "stabilityai/stable-diffusion-3-medium-diffusers", said, "zoo.load('mini-sd')")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (huggingface_hub.errors.GatedRepoError, "is gated"),
        (huggingface_hub.errors.EntryNotFoundError, "has no model_index.json; expected a diffusers pipeline"),
        (OSError, "did not arrive (OSError: the line broke); try again"),
    ],
)
def test_the_download_fails(kind, said, monkeypatch):
    """Facts of a gated model are public, its files are not; and a line can break at any file."""

    def download(*_, **__):
        error = kind.__new__(kind)  # their constructors want the answer of a server
        error.args = ("the line broke\nand more",)
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    monkeypatch.setattr(huggingface_hub.errors.HfHubHTTPError, "__str__", lambda self: self.args[0])
    refused(NAME, HUB_ID, said)


@pytest.mark.slow
def test_a_download(tmp_path):
    """From the hub once, then from the cache, also when the hub is gone; in a process, since the address is read at import."""
    pipelines.stable_diffusion().save_pretrained(tmp_path / "repo")
    code = f"""
from course_lib import zoo
before = zoo.available({NAME!r})
print(before, zoo.load({NAME!r}, device="cpu").shape, zoo.available({NAME!r}))
"""

    def run(address):
        own = {"HF_ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")}
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"} | own
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
        return result.stdout.strip() or result.stderr

    with serving(tmp_path / "repo") as address:
        assert run(address) == "False (4, 8, 8) True"
    assert run(address) == "True (4, 8, 8) True"
