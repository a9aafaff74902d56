"""Prompt lists and images at a URL."""

from __future__ import annotations

import functools
import http.server
import threading

import fsspec
import pytest
from PIL import Image

from sculpt_dist.core.errors import ConfigError
from sculpt_dist.data.images import own_images
from sculpt_dist.data.prompt_files import read_prompts
from sculpt_dist.data.remote import local_copy


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    local_copy.cache_clear()


@pytest.fixture
def server(tmp_path):
    """(address, folder, requests) of a local web server."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append((self.command, self.path))

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}", folder, asked
    web.shutdown()
    web.server_close()


def save(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(folder / name)


def test_a_list_of_prompts_is_read_from_a_web_server_once_and_again_when_it_changes(server):
    address, folder, asked = server
    (folder / "list.csv").write_text("prompt,seed\na cat,7\na dog,8\n")
    first = read_prompts(f"{address}/list.csv")
    assert [(line.prompt, line.seed) for line in first] == [("a cat", 7), ("a dog", 8)]
    downloads = asked.count(("GET", "/list.csv"))
    local_copy.cache_clear()  # another process
    assert read_prompts(f"{address}/list.csv") == first and asked.count(("GET", "/list.csv")) <= 2 * downloads - 1
    (folder / "list.csv").write_text("prompt,seed\na house,9\n")
    local_copy.cache_clear()
    assert read_prompts(f"{address}/list.csv")[0].prompt == "a house"


def test_own_images_are_read_from_a_web_server(server):
    address, folder, _ = server
    save(folder / "mine" / "Cat", "a.png", "b.png")
    images, others = own_images(f"{address}/mine/", "cat")
    assert [path.name for path in images] == ["a.png", "b.png"] and others == []
    assert Image.open(images[0]).size == (8, 8)


def test_lists_and_images_are_read_from_any_storage_of_fsspec(tmp_path):
    memory = fsspec.filesystem("memory")
    save(tmp_path / "local" / "van gogh", "c.png")
    memory.put(str(tmp_path / "local"), "/bucket/own", recursive=True)
    memory.pipe_file("/bucket/list.txt", b"a cat\na dog\n")
    assert [line.prompt for line in read_prompts("memory://bucket/list.txt")] == ["a cat", "a dog"]
    assert [path.name for path in own_images("memory://bucket/own", "van_gogh")[0]] == ["c.png"]
    memory.pipe_file("/bucket/list.txt", b"a bird\n")
    local_copy.cache_clear()
    assert [line.prompt for line in read_prompts("memory://bucket/list.txt")] == ["a bird"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nowhere/list.txt", "memory://nowhere/list.txt: cannot be read"),
        ("http://127.0.0.1:9/list.txt", "http://127.0.0.1:9/list.txt: cannot be read"),
        ("nosuch://bucket/list.txt", "nosuch://bucket/list.txt: cannot be read .*Protocol not known: nosuch"),
        ("http://me:SECRET@127.0.0.1:9/list.txt", "cannot be read"),
    ],
)
def test_what_cannot_be_had_is_named_in_one_line_without_passwords(url, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_prompts(url)
    assert "SECRET" not in str(error.value) and "\n" not in str(error.value)


def test_a_storage_that_names_files_outside_of_the_folder_is_refused(monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/evil/a.txt", b"x")
    files = {"/evil/../../../a.txt": {"type": "file", "size": 1, "created": 1}}
    monkeypatch.setattr(type(memory), "find", lambda *_, **__: files)
    with pytest.raises(ConfigError, match="memory://evil: names a file outside of itself"):
        local_copy("memory://evil")
