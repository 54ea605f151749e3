"""CIFAR-10's files: downloads, damage, and what their user is told."""

import os
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.transforms import functional as F

from fake_cifar10 import BASE, make_archive, md5, serving
from sam_lightning.data import CIFAR10, DataError

REAL = os.environ.get("SAM_LIGHTNING_DATA")
needs_cifar10 = pytest.mark.skipif(not REAL, reason="SAM_LIGHTNING_DATA does not name a folder with CIFAR-10")


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def use(monkeypatch, url, archive):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", md5(archive))


def test_a_download_leaves_the_files_and_nothing_else(fake_files, tmp_path, monkeypatch):
    archive = make_archive(fake_files)
    with serving(archive) as url:
        use(monkeypatch, url, archive)
        data = CIFAR10(root=str(tmp_path / "new" / "root"), validation="none")
        data.prepare_data()
    assert everything_in(data.root) == sorted([BASE, *(f"{BASE}/{name}" for name in fake_files)])
    data.prepare_data()  # there now: the server is gone
    data.setup("fit")
    assert len(data._train) == 100


def test_a_download_adds_only_what_is_missing(fake_files, fake_cifar10, monkeypatch):
    path = fake_cifar10 / BASE / "data_batch_1"
    (fake_cifar10 / BASE / "test_batch").unlink()
    before = path.stat().st_ino
    archive = make_archive(fake_files)
    with serving(archive) as url:
        use(monkeypatch, url, archive)
        CIFAR10(root=str(fake_cifar10)).prepare_data()
    assert path.stat().st_ino == before
    assert (fake_cifar10 / BASE / "test_batch").read_bytes() == fake_files["test_batch"]


@pytest.mark.parametrize("fault", ["404", "truncated", "wrong", "refused", "escaping", "incomplete", "link"])
@pytest.mark.parametrize("root_exists", [False, True])
def test_a_failed_download_leaves_nothing(fake_files, tmp_path, monkeypatch, fault, root_exists):
    root = tmp_path / "outer" / "images" if root_exists else tmp_path / "outer" / "new" / "images"
    (tmp_path / "outer").mkdir()
    if root_exists:
        root.mkdir()
        (root / "mine.txt").write_text("kept")
    archive = make_archive(fake_files, prefix="../.." if fault == "escaping" else BASE)
    if fault == "incomplete":
        archive = make_archive({"data_batch_1": fake_files["data_batch_1"]})
    if fault == "link":
        archive = make_archive(fake_files, links={"test_batch": str(Path(__file__))})
    body = {"truncated": archive[: len(archive) // 2], "wrong": b"no archive"}.get(fault, archive)
    length = len(archive) if fault == "truncated" else None
    with serving(body, status=404 if fault == "404" else 200, claimed_length=length) as url:
        use(monkeypatch, "http://127.0.0.1:9/none.tar.gz" if fault == "refused" else url, archive)
        with pytest.raises(DataError) as error:
            CIFAR10(root=str(root)).prepare_data()
    message = str(error.value)
    if fault == "404":  # an answer like any other: left open, its connection would be told of in some later test
        assert error.value.__cause__.closed
    assert f"{', '.join(fake_files)} not found in {root / BASE} (--data.root)" in message
    assert "failed" in message
    assert "name another folder by --data.root or SAM_LIGHTNING_DATA" in message
    assert everything_in(tmp_path) == (["outer", "outer/images", "outer/images/mine.txt"] if root_exists else ["outer"])


def test_an_interrupted_download_leaves_nothing(fake_files, tmp_path, monkeypatch):
    def interrupted(url, folder, *_):
        (folder / "half").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("sam_lightning.data.cifar10.download_url", interrupted)
    with pytest.raises(KeyboardInterrupt):
        CIFAR10(root=str(tmp_path / "root")).prepare_data()
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("faster", ["complete", "partial"])
def test_a_download_gives_way_to_a_faster_one(fake_files, tmp_path, monkeypatch, faster):
    archive = make_archive(fake_files)

    def download(url, folder, filename, _):
        (folder / filename).write_bytes(archive)
        (tmp_path / BASE).mkdir()
        for name in list(fake_files)[: 2 if faster == "partial" else None]:
            (tmp_path / BASE / name).write_bytes(fake_files[name])

    monkeypatch.setattr("sam_lightning.data.cifar10.download_url", download)
    data = CIFAR10(root=str(tmp_path))
    data.prepare_data()
    assert everything_in(tmp_path) == sorted([BASE, *(f"{BASE}/{name}" for name in fake_files)])
    data.setup("fit")


def test_a_root_that_cannot_be_written_says_so(fake_files, tmp_path):
    (tmp_path / "file").write_text("kept")  # no folder can be made in here, whoever asks
    with pytest.raises(DataError, match=r"Nothing can be written there .*Make the folder writable, or name another"):
        CIFAR10(root=str(tmp_path / "file" / "root")).prepare_data()
    assert everything_in(tmp_path) == ["file"]


def test_a_file_that_cannot_be_read_is_named(fake_cifar10, monkeypatch):
    def refuse(path, md5):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("sam_lightning.data.cifar10.check_integrity", refuse)
    with pytest.raises(DataError, match=r"data_batch_1 \(folder from --data.root\) cannot be read: .*Permission"):
        CIFAR10(root=str(fake_cifar10)).setup("fit")


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", ["truncated", "hostile"])
def test_a_damaged_file_is_named_kept_and_never_unpickled(fake_cifar10, tmp_path, name, damage):
    path = fake_cifar10 / BASE / name
    victim = tmp_path / "victim"
    hostile = b"cposix\nsystem\n(S'touch " + str(victim).encode() + b"'\ntR."
    path.write_bytes(path.read_bytes()[:-10] if damage == "truncated" else hostile)
    content = path.read_bytes()
    data = CIFAR10(root=str(fake_cifar10))
    for action in (data.prepare_data, lambda: data.setup("fit")):
        message = rf"{path} \(folder from --data.root\) is damaged \({len(content)} bytes, MD5 is not .* Delete it or"
        with pytest.raises(DataError, match=message):
            action()
    assert path.read_bytes() == content
    assert not victim.exists()


def test_who_names_the_root(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:  # undone before the check for leaks
        patch.delenv("SAM_LIGHTNING_DATA", raising=False)
        with pytest.raises(DataError, match=rf"not found in {tmp_path}/data/{BASE} \(the default; neither"):
            CIFAR10(download=False).prepare_data()
        patch.setenv("SAM_LIGHTNING_DATA", str(tmp_path / "variable"))
        with pytest.raises(DataError, match=rf"{tmp_path}/variable/{BASE} \(SAM_LIGHTNING_DATA\)"):
            CIFAR10(download=False).setup("fit")
        assert CIFAR10(root="typed").root == Path("typed")
        assert CIFAR10(root="~/typed").root == Path.home() / "typed"
    assert everything_in(tmp_path) == []


def test_a_read_only_root_will_do(fake_cifar10):
    for path in [fake_cifar10, fake_cifar10 / BASE]:
        path.chmod(0o555)
    data = CIFAR10(root=str(fake_cifar10))
    before = everything_in(fake_cifar10)
    data.prepare_data()
    data.setup("fit")
    assert everything_in(fake_cifar10) == before
    for path in [fake_cifar10, fake_cifar10 / BASE]:
        path.chmod(0o755)


@needs_cifar10
def test_the_real_cifar10():
    data = CIFAR10(validation="none", random_crop=False, horizontal_flip=False)
    data.prepare_data()
    data.setup("fit")
    train, test = data._train, data._test
    assert train.images.shape == (50_000, 3, 32, 32)
    assert test.images.shape == (10_000, 3, 32, 32)
    assert train.labels.bincount().tolist() == [5_000] * 10
    assert test.labels.bincount().tolist() == [1_000] * 10
    share = torch.stack([part.flatten().bincount(minlength=256) for part in train.images.unbind(1)]) / (50_000 * 32**2)
    value = torch.arange(256) / 255
    mean = share @ value
    assert mean.tolist() == pytest.approx(CIFAR10.mean, abs=5e-5)
    assert (share @ value.square() - mean.square()).sqrt().tolist() == pytest.approx(CIFAR10.std, abs=5e-5)
    image, label = torchvision.datasets.CIFAR10(REAL)[123]
    assert torch.equal(F.pil_to_tensor(image), train.images[123])
    assert train.labels[123] == label
