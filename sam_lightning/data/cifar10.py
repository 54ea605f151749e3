"""CIFAR-10 through torchvision, held in memory."""

import os
import shutil
import tarfile
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import HTTPError

import torch
import torchvision
from torchvision.datasets.utils import check_integrity, download_url

from sam_lightning.data.augment import CropAndFlip
from sam_lightning.data.datamodule import ImageData, Validation
from sam_lightning.data.images import Images
from sam_lightning.data.normalise import Normalisation

VARIABLE = "SAM_LIGHTNING_DATA"
ELSEWHERE = f"name another folder by --data.root or {VARIABLE}"


class DataError(RuntimeError):
    """Data that are missing, damaged, unreadable, or cannot be downloaded."""


class CIFAR10(ImageData):
    """CIFAR-10: 50,000 training and 10,000 test images, 32x32, three channels, ten classes.

    Args:
        root: Folder that holds `cifar-10-batches-py`; `None`: the environment variable
            SAM_LIGHTNING_DATA, else `data`.
        download: Whether to download the data if they are not there.
        random_crop: Crop training images at random, after padding with 4 zeros on each side.
        horizontal_flip: Mirror training images at random.
        batch_size: See `ImageData`, as all that follow.
        validation: split, test or none.
        validation_fraction: Held-out share of the training set.
        split_seed: Seed of the split.
        training_samples: Number of training samples; all by default.
        label_noise: Probability with which each training label is redrawn over all classes.
        label_noise_seed: Seed of the label noise.
        normalisation: unit, half or standard.
        seed: Seed of order and augmentation.
        num_workers: Worker processes.
        eval_batch_size: Samples per evaluation batch.
        drop_last: Whether an incomplete last training batch is left out.

    Raises:
        DataError: If the data are neither there nor downloadable, or a file is damaged or unreadable.
        ValueError: See `ImageData`.

    Reference:
        A. Krizhevsky. Learning Multiple Layers of Features from Tiny Images. 2009.
    """

    num_classes = 10
    largest = 255.0
    mean = (0.4914, 0.4822, 0.4465)  # both computed over all pixels of the 50,000 training images
    std = (0.2470, 0.2435, 0.2616)

    def __init__(
        self,
        root: str | None = None,
        download: bool = True,
        random_crop: bool = True,
        horizontal_flip: bool = True,
        batch_size: int = 128,
        validation: Validation = "split",
        validation_fraction: float = 0.1,
        split_seed: int = 0,
        training_samples: int | None = None,
        label_noise: float = 0.0,
        label_noise_seed: int = 0,
        normalisation: Normalisation = "standard",
        seed: int | None = None,
        num_workers: int = 0,
        eval_batch_size: int | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            validation=validation,
            validation_fraction=validation_fraction,
            split_seed=split_seed,
            training_samples=training_samples,
            label_noise=label_noise,
            label_noise_seed=label_noise_seed,
            normalisation=normalisation,
            seed=seed,
            num_workers=num_workers,
            eval_batch_size=eval_batch_size,
            drop_last=drop_last,
        )
        self.save_hyperparameters()
        self.root, self._named_by = _find_root(root)
        self.download = download
        self.random_crop = random_crop
        self.horizontal_flip = horizontal_flip

    def prepare_data(self) -> None:
        """Downloads what is missing; a damaged file is reported and left alone."""
        if missing := self._missing():
            if not self.download:
                raise DataError(f"{self._absent(missing)} Put the data there, {ELSEWHERE}, or allow --data.download.")
            self._fetch(missing)

    def load(self) -> tuple[Images, Images]:
        """Training and test images."""
        if missing := self._missing():
            raise DataError(f"{self._absent(missing)} Put the data there, or {ELSEWHERE}.")
        parts = []
        for train in (True, False):
            part = torchvision.datasets.CIFAR10(self.root, train=train)
            images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
            parts.append(Images(images, torch.tensor(part.targets)))
        return parts[0], parts[1]

    def augmentation(self, samples: int) -> CropAndFlip:
        """Random crop and flip, each if it is switched on."""
        return CropAndFlip(samples, self.seed, crop=self.random_crop, flip=self.horizontal_flip)

    def _missing(self) -> list[str]:
        """Names of the files that are not there; nothing that is damaged is ever unpickled."""
        cls = torchvision.datasets.CIFAR10
        missing = []
        for name, md5 in [*cls.train_list, *cls.test_list, [cls.meta["filename"], cls.meta["md5"]]]:
            path = self._folder / name
            where = f"CIFAR-10: {path.resolve()} (folder from {self._named_by})"
            try:
                if not path.is_file():
                    missing.append(name)
                elif not check_integrity(path, md5):
                    raise DataError(
                        f"{where} is damaged ({path.stat().st_size} bytes, MD5 is not {md5}). Delete it or move it "
                        "away, and run again with --data.download true (the default)."
                    )
            except OSError as error:
                raise DataError(f"{where} cannot be read: {error}. Make it readable, or {ELSEWHERE}.") from error
        return missing

    @property
    def _folder(self) -> Path:
        name: str = torchvision.datasets.CIFAR10.base_folder
        return self.root / name

    def _absent(self, missing: list[str]) -> str:
        return f"CIFAR-10: {', '.join(missing)} not found in {self._folder.resolve()} ({self._named_by})."

    def _fetch(self, missing: list[str]) -> None:
        """Downloads and unpacks into a folder beside the target, and moves what is complete into place."""
        created = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]  # deepest first
        try:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                beside = TemporaryDirectory(prefix=".cifar10-", dir=self.root, ignore_cleanup_errors=True)
            except OSError as error:
                raise DataError(
                    f"{self._absent(missing)} Nothing can be written there to download them: {error}. "
                    f"Make the folder writable, or {ELSEWHERE}."
                ) from error
            with beside:
                try:
                    _download(Path(beside.name), missing)
                    self._move(Path(beside.name), missing)
                # tarfile, KeyError: what the archive holds; http: what the server says.
                except (OSError, RuntimeError, EOFError, KeyError, tarfile.TarError, HTTPException) as error:
                    if isinstance(error, HTTPError):
                        error.close()  # a response like any other, with its connection
                    url = torchvision.datasets.CIFAR10.url
                    raise DataError(
                        f"{self._absent(missing)} The download from {url} failed: {error}. "
                        f"Put the data there, or {ELSEWHERE}."
                    ) from error
        finally:
            for folder in created:
                with suppress(OSError):
                    folder.rmdir()  # refuses where anything is inside

    def _move(self, beside: Path, missing: list[str]) -> None:
        unpacked = beside / self._folder.name
        try:
            unpacked.rename(self._folder)  # all or nothing
        except OSError:  # there is such a folder: some files were there, or another process was faster
            for name in missing:
                os.replace(unpacked / name, self._folder / name)


def _download(folder: Path, names: list[str]) -> None:
    """Downloads the archive into `folder` and takes the named files, and nothing else, out of it."""
    cls = torchvision.datasets.CIFAR10
    download_url(cls.url, folder, cls.filename, cls.tgz_md5)
    (folder / cls.base_folder).mkdir()
    with tarfile.open(folder / cls.filename) as archive:
        for name in names:
            # Not extractall: torchvision's, before 0.27, follows an archive's paths out of the folder.
            member = archive.extractfile(f"{cls.base_folder}/{name}")
            if member is None:
                raise tarfile.ExtractError(f"{name} is not a file in the archive")
            with member, (folder / cls.base_folder / name).open("wb") as file:
                shutil.copyfileobj(member, file)


def _find_root(root: str | None) -> tuple[Path, str]:
    """The folder of the data, and who named it."""
    if root is not None:
        return Path(root).expanduser(), "--data.root"
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE]).expanduser(), VARIABLE
    return Path("data"), f"the default; neither --data.root nor {VARIABLE} is set"
