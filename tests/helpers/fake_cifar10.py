"""A tiny CIFAR-10 in the real on-disk format, in a folder or served as an archive on loopback."""

import hashlib
import io
import pickle
import tarfile
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torchvision

BASE = torchvision.datasets.CIFAR10.base_folder


def make_files(per_batch: int = 20) -> dict[str, bytes]:
    """The eight files: seeded random images, labels that cycle through the classes."""
    rng = np.random.default_rng(0)
    files = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        images = rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        content = {"batch_label": name, "labels": [i % 10 for i in range(per_batch)], "data": images, "filenames": []}
        files[name] = pickle.dumps(content, protocol=2)
    files["batches.meta"] = pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}, protocol=2)
    return files


def make_archive(files: dict[str, bytes], prefix: str = BASE, links: dict[str, str] | None = None) -> bytes:
    """A gzipped tar of the files under `prefix`; those in `links` are symbolic links to what it names."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{prefix}/{name}")
            if links and name in links:
                entry.type, entry.linkname = tarfile.SYMTYPE, links[name]
            else:
                entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def fake_files(monkeypatch) -> dict[str, bytes]:
    """The files' contents, with torchvision told their checksums."""
    files = make_files()
    cls = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cls, "train_list", [[f"data_batch_{i}", md5(files[f"data_batch_{i}"])] for i in range(1, 6)])
    monkeypatch.setattr(cls, "test_list", [["test_batch", md5(files["test_batch"])]])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(files["batches.meta"])})
    return files


@pytest.fixture
def fake_cifar10(fake_files, tmp_path) -> Path:
    """A root that holds the tiny CIFAR-10."""
    folder = tmp_path / "fake" / BASE
    folder.mkdir(parents=True)
    for name, content in fake_files.items():
        (folder / name).write_bytes(content)
    return folder.parent


@contextmanager
def serving(body: bytes, status: int = 200, claimed_length: int | None = None):
    """Serves `body` at any path on loopback; `claimed_length` promises more than comes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(claimed_length or len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
