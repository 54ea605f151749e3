"""Files and checkpoints that are whole or not there."""

import os

import pytest
import torch

from sam_lightning.runs.atomic_files import replacing
from sam_lightning.runs.checkpoint_io import AtomicCheckpointIO
from sam_lightning.runs.checkpoints import CheckpointError


def test_a_draft_takes_the_place_of_the_file(tmp_path):
    path = tmp_path / "new" / "file"
    for text in ("one", "two"):
        with replacing(path) as draft:
            draft.write_text(text)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with replacing(path) as draft:
            draft.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("fsync"), sync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    with replacing(tmp_path / "file") as draft:
        draft.write_text("text")
    assert done == ["fsync", "replace"]


def test_a_checkpoint_is_written_beside_its_target(tmp_path, monkeypatch):
    path = tmp_path / "checkpoints/last.ckpt"
    files = AtomicCheckpointIO()
    files.save_checkpoint({"epoch": 1}, path)

    def full(content, file):
        assert os.path.dirname(file) == str(path.parent)
        with open(file, "wb") as half:
            half.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(CheckpointError, match=r"last.ckpt cannot be written \([\d,]+ bytes free\): .* No space"):
            files.save_checkpoint({"epoch": 2}, path)
    assert files.load_checkpoint(path, weights_only=True) == {"epoch": 1}
    assert os.listdir(path.parent) == ["last.ckpt"]
    with pytest.raises(TypeError, match="storage_options must be None"):
        files.save_checkpoint({}, path, storage_options={})
