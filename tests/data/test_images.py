"""The data modules: order, resume, preparation on the device, and splits."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torchvision.transforms import functional as F  # torchvision's own name for it

from sam_lightning.data import CIFAR10, Digits
from sam_lightning.data.augment import CropAndFlip, crop_and_flip
from sam_lightning.data.images import Images
from sam_lightning.data.label_noise import redraw
from sam_lightning.data.loader import BatchLoader
from sam_lightning.data.sampler import EpochSampler


def images(count=103, channels=3, size=8):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 10)


def order(seed, epoch, data=None, **share):
    sampler = EpochSampler(data or images(), seed, shuffle=True, **share)
    sampler.set_epoch(epoch)
    return list(sampler)


def module(**options):
    data = CIFAR10(**{"batch_size": 7, "seed": 3, **options})
    data.setup("fit")
    return data


# Order and resume.


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    torch.manual_seed(1)
    a = order(20, 10)
    torch.manual_seed(2)
    assert order(20, 10) == a
    assert sorted(a) == list(range(103))
    others = [order(30, 0), order(20, 11), order(21, 10), order(10, 20), order(20 + (10 << 32), 0)]
    for other in others:  # seed + epoch would make some of them equal; random ones share 1 place on average
        assert sum(x == y for x, y in zip(a, other, strict=True)) < 10


@pytest.mark.parametrize("count", [96, 103, 1, 3])
@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_together_see_the_single_process_batches(count, world):
    whole = order(5, 2, images(count))
    ranks = [order(5, 2, images(count), world=world, rank=rank) for rank in range(world)]
    assert len({len(share) for share in ranks}) == 1
    together = [sample for step in zip(*ranks, strict=True) for sample in step]
    assert together[:count] == whole
    assert set(together[count:]) <= set(whole)


def test_two_ranks_batches_together_are_the_single_process_batch(fake_cifar10):
    def batches(batch_size, kwargs):
        data = module(root=str(fake_cifar10), batch_size=batch_size, validation="none")
        data.trainer = SimpleNamespace(
            overfit_batches=0,
            distributed_sampler_kwargs=kwargs,
            fit_loop=SimpleNamespace(epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=4))),
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
        )
        loader = data.train_dataloader()
        assert loader.sampler.epoch == 4  # as a run resumed behind four epochs needs it
        tested = [sample for batch in data.test_dataloader() for sample in batch[2].tolist()]
        return [set(batch[2].tolist()) for batch in loader], tested

    ranks, tested = zip(*(batches(5, {"num_replicas": 2, "rank": rank}) for rank in range(2)), strict=True)
    whole, all_tested = batches(10, None)
    assert [a | b for a, b in zip(*ranks, strict=True)] == whole
    assert sorted(tested[0] + tested[1]) == all_tested == list(range(20))


def test_evaluation_counts_every_sample_once():
    shares = [EpochSampler(images(), 0, shuffle=False, world=4, rank=rank) for rank in range(4)]
    assert sorted(sample for share in shares for sample in share) == list(range(103))
    assert [len(share) for share in shares] == [len(list(share)) for share in shares]


class Recording(Images):
    """Remembers which positions were read."""

    def __init__(self, other):
        super().__init__(other.images, other.labels)
        self.read = []

    def __getitems__(self, positions):
        self.read.append(positions)
        return super().__getitems__(positions)


@pytest.mark.parametrize(
    ("workers", "stop", "drop_last"),
    [
        *((0, stop, drop_last) for stop in (0, 1, 4, 10, 11) for drop_last in (False, True)),
        (2, 4, True),
        (2, 11, False),
    ],
)
def test_a_resumed_loader_goes_on_where_it_was(workers, stop, drop_last):
    def make():
        data = Recording(images())
        sampler = EpochSampler(data, 1, shuffle=True)
        sampler.set_epoch(3)
        return BatchLoader(data, 10, sampler, num_workers=workers, drop_last=drop_last), data

    loader, _ = make()
    whole = [batch[2].tolist() for batch in loader]
    stop = min(stop, len(whole))
    loader, _ = make()
    iterator = iter(loader)
    for _ in range(stop):
        next(iterator)
    state = loader.state_dict()
    assert state == {"epoch": 3, "batches": stop}
    iterator.close()

    before = torch.get_rng_state()
    resumed, data = make()
    resumed.load_state_dict(state)
    rest = [batch[2].tolist() for batch in resumed]
    again = [batch[2].tolist() for batch in resumed]  # the next iteration is a whole epoch
    assert torch.equal(torch.get_rng_state(), before)
    if stop == len(whole):  # the epoch was complete: it is the next one's turn
        assert rest == again != whole
        assert resumed.state_dict()["epoch"] == 4
    else:
        assert rest == whole[stop:]
        assert again == whole
        assert workers or len(data.read) == len(whole) - stop + len(whole)  # skipped batches are not read


def test_a_position_belongs_to_its_epoch():
    def make():
        return BatchLoader(images(), 10, EpochSampler(images(), 1, shuffle=True))

    loader = make()
    list(loader)
    assert loader.state_dict() == {"epoch": 0, "batches": 11}
    loader.sampler.set_epoch(1)  # as Lightning does before the first batch
    assert loader.state_dict() == {"epoch": 1, "batches": 0}
    loader.load_state_dict({"epoch": 2, "batches": 3})
    assert loader.state_dict() == {"epoch": 2, "batches": 3}
    loader.sampler.set_epoch(5)
    assert len(list(loader)) == 11


class Watching(LightningModule):
    """Keeps every batch that it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.trained.append((self.current_epoch, batch_idx, batch[0].clone()))
        return self.weight * batch[0].mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch[0].clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("workers", "places"),
    [(0, ["step=4", "end-step=6", "step=8", "end-step=12", "step=16"]), (2, ["end-step=6", "step=8"])],
)
@pytest.mark.filterwarnings("ignore:You are resuming from a checkpoint that ended before the epoch ended")  # exact here
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # the resumed run's own
def test_a_resumed_run_sees_the_same_augmented_batches(fake_cifar10, trainer, tmp_path, workers, places):
    def fit(ckpt_path=None):
        model, data = Watching(), CIFAR10(str(fake_cifar10), batch_size=16, seed=3, num_workers=workers)
        savers = [
            ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=4, save_top_k=-1),
            ModelCheckpoint(tmp_path / "ckpt", filename="end-{step}", save_top_k=-1, save_on_train_epoch_end=True),
        ]
        run = trainer(max_epochs=3, callbacks=savers, enable_checkpointing=True)
        run.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        held_out = data.normalise(data._val.images)
        assert all(torch.equal(batch, held_out) for batch in model.validated)  # one batch of 10, never augmented
        return model.trained

    whole = fit()
    assert len(whole) == 18
    assert not torch.equal(whole[0][2], whole[6][2])
    for place in places:
        done = int(place.partition("=")[2])
        rest = fit(tmp_path / "ckpt" / f"{place}.ckpt")
        assert [step[:2] for step in rest] == [step[:2] for step in whole[done:]]
        assert all(torch.equal(a[2], b[2]) for a, b in zip(rest, whole[done:], strict=True))


def test_lightnings_own_samplers_fit_in(trainer):
    data, model = Digits(batch_size=50), Watching()
    trainer(overfit_batches=2, max_epochs=2).fit(model, datamodule=data)
    assert [step[:2] for step in model.trained] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert torch.equal(model.trained[0][2], model.trained[2][2])
    model.predict_step = lambda batch, batch_idx: batch[0]
    predicted = trainer().predict(model, datamodule=data)
    assert torch.equal(torch.cat(predicted), data.normalise(data._test.images))


# Preparation.


def test_crop_and_flip_equals_torchvision_image_by_image():
    data = images(20, size=32).images
    generator = torch.Generator().manual_seed(4)
    top, left = torch.randint(0, 9, (2, 20), generator=generator)
    flip = torch.rand(20, generator=generator) < 0.5
    got = crop_and_flip(data, top, left, flip, padding=4)
    for i in range(20):
        expected = F.crop(F.pad(data[i], [4]), int(top[i]), int(left[i]), 32, 32)
        assert torch.equal(got[i], F.hflip(expected) if flip[i] else expected)


def test_augmentation_depends_on_seed_epoch_and_sample_alone():
    data = images(40)
    samples = data.samples

    def augmented(seed=1, epoch=2, crop=True, flip=True, parts=1):
        augment = CropAndFlip(40, seed, crop, flip)
        return torch.cat([augment(data.images[p], p, epoch) for p in samples.chunk(parts)])

    whole = augmented()
    assert torch.equal(augmented(parts=7), whole)
    assert not torch.equal(augmented(epoch=3), whole)
    assert not torch.equal(augmented(seed=2), whole)
    shuffled = torch.randperm(40)
    assert torch.equal(CropAndFlip(40, 1, True, True)(data.images[shuffled], shuffled, 2), whole[shuffled])
    assert torch.equal(augmented(crop=False, flip=False), data.images)
    flipped = (augmented(crop=False) == data.images.flip(-1)).flatten(1).all(1)
    kept = (augmented(crop=False) == data.images).flatten(1).all(1)
    assert torch.equal(flipped, ~kept)
    assert 8 < flipped.sum() < 32
    cropped = augmented(flip=False)
    assert torch.equal(torch.where(flipped[:, None, None, None], cropped.flip(-1), cropped), whole)


@pytest.mark.parametrize(
    ("normalisation", "mean", "std"),
    [("unit", [0.0] * 3, [1.0] * 3), ("half", [0.5] * 3, [0.5] * 3), ("standard", CIFAR10.mean, CIFAR10.std)],
)
def test_normalisation_equals_torchvisions_bit_for_bit(normalisation, mean, std):
    data = images().images
    ours = CIFAR10(normalisation=normalisation).normalise(data)
    for image, got in zip(data, ours, strict=True):
        expected = F.normalize(F.to_tensor(image.permute(1, 2, 0).numpy()), mean, std)
        assert torch.equal(got, expected)


def test_only_training_is_augmented(fake_cifar10, trainer):
    data = module(root=str(fake_cifar10), normalisation="unit")
    data.trainer = trainer()
    batch = next(iter(data.train_dataloader()))
    data.trainer.training = True
    augmented = data.on_after_batch_transfer(batch, 0)[0]
    assert not torch.equal(augmented, batch[0] / 255)
    data.trainer.fit_loop.epoch_progress.current.processed = 1
    assert not torch.equal(data.on_after_batch_transfer(batch, 0)[0], augmented)
    data.trainer.validating = True
    assert torch.equal(data.on_after_batch_transfer(batch, 0)[0], batch[0] / 255)
    data.trainer.testing = True
    assert torch.equal(data.on_after_batch_transfer(batch, 0)[0], batch[0] / 255)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", torch.float32), ("64-true", torch.float64), ("bf16-true", torch.bfloat16)],
)
def test_images_come_in_the_type_of_the_weights(fake_cifar10, trainer, precision, dtype):
    data = module(root=str(fake_cifar10))
    data.trainer = trainer(precision=precision)
    batch = next(iter(data.val_dataloader()))
    got, labels = data.on_after_batch_transfer(batch, 0)
    assert got.dtype == dtype
    assert labels.dtype == torch.int64
    assert torch.equal(got, data.normalise(batch[0]).to(dtype))


def test_memory_is_pinned_only_for_a_gpu_in_use(fake_cifar10, trainer, monkeypatch):
    data = module(root=str(fake_cifar10))
    data.trainer = trainer()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # there, and not used by this run
    loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()]
    assert not any(loader.pin_memory for loader in loaders)
    monkeypatch.setattr(type(data.trainer.strategy), "root_device", torch.device("cuda"))
    assert data.train_dataloader().pin_memory


# Splits.


def test_the_split_is_stratified_disjoint_and_its_own(fake_cifar10):
    def parts(**options):
        data = module(root=str(fake_cifar10), validation_fraction=0.2, **options)
        kept = torch.cat([batch[2] for batch in data.train_dataloader()])
        held_out = torch.cat([batch[2] for batch in data.val_dataloader()])
        labels = torch.cat([batch[1] for batch in data.val_dataloader()])
        return set(kept.tolist()), set(held_out.tolist()), labels

    kept, held_out, labels = parts()
    assert kept | held_out == set(range(100))
    assert not kept & held_out
    assert labels.bincount().tolist() == [2] * 10
    assert parts(seed=9)[1] == held_out
    assert parts(split_seed=1)[1] != held_out


@pytest.mark.parametrize("validation", ["split", "test"])
def test_a_part_of_the_training_set_is_stratified_and_keeps_its_labels(validation):
    def train(**options):
        return noisy(validation=validation, **options)

    samples, labels = labels_of(train().train_dataloader())
    part, own = labels_of(train(training_samples=200, seed=9).train_dataloader())
    assert len(part) == 200
    assert set(part.tolist()) <= set(samples.tolist())  # none that validates
    assert torch.equal(own, labels[torch.searchsorted(samples, part)])
    clean = dict(zip(*(t.tolist() for t in labels_of(train(label_noise=0.0).train_dataloader())), strict=True))
    assert set(torch.tensor([clean[sample] for sample in part.tolist()]).bincount().tolist()) <= {19, 20, 21}
    held_out = [labels_of(data.val_dataloader())[0] for data in (train(), train(training_samples=200))]
    assert torch.equal(*held_out)
    assert not torch.equal(part, labels_of(train(training_samples=200, split_seed=1).train_dataloader())[0])
    assert len(labels_of(train(training_samples=len(samples)).train_dataloader())[0]) == len(samples)
    for size in (9, len(samples) - 9, len(samples) + 1):
        with pytest.raises(ValueError, match=rf"training_samples must be in .*all {len(samples)} of .*, got {size}\."):
            train(training_samples=size)


def test_validation_on_the_test_set_or_none(fake_cifar10):
    test = module(root=str(fake_cifar10), validation="test")
    assert sum(len(batch[0]) for batch in test.train_dataloader()) == 100
    for batch, other in zip(test.val_dataloader(), test.test_dataloader(), strict=True):
        assert torch.equal(batch[0], other[0])
    assert module(root=str(fake_cifar10), validation="none").val_dataloader() == []


def test_digits_need_nothing_and_keep_their_test_set():
    a, b = Digits(seed=1), Digits(seed=2, split_seed=5)
    for data in (a, b):
        data.setup("fit")
    test = torch.cat([batch[0] for batch in a.test_dataloader()])
    assert torch.equal(test, torch.cat([batch[0] for batch in b.test_dataloader()]))
    assert test.shape == (360, 1, 8, 8)
    train = torch.cat([batch[0] for loader in (a.train_dataloader(), a.val_dataloader()) for batch in loader])
    assert len(train) == 1437
    assert train.max() == 16
    assert not {t.numpy().tobytes() for t in train} & {t.numpy().tobytes() for t in test}
    scaled = Digits().normalise(train)
    assert scaled.mean().item() == pytest.approx(Digits.mean[0], abs=5e-5)
    assert scaled.std().item() == pytest.approx(Digits.std[0], abs=5e-5)


# Label noise.


def labels_of(loader):
    """(sample numbers, labels) in the order of the numbers."""
    batches = list(loader)
    samples, labels = (torch.cat([batch[i] for batch in batches]) for i in (2, 1))
    at = samples.argsort()
    return samples[at], labels[at]


def noisy(**options):
    data = Digits(**{"label_noise": 0.4, **options})
    data.setup("fit")
    return data


def test_label_noise_redraws_this_share_of_labels_uniformly_over_all_classes():
    clean = torch.arange(10).repeat(5000)
    got = redraw(clean, 10, 0.4, seed=3)
    assert torch.equal(clean, torch.arange(10).repeat(5000))  # not changed in place
    assert (got != clean).float().mean() == pytest.approx(0.36, abs=0.01)  # a tenth of the redrawn hit the true class
    table = torch.zeros(10, 10).index_put((clean, got), torch.ones(50000), accumulate=True) / 5000
    off_diagonal = table[~torch.eye(10, dtype=torch.bool)]
    assert off_diagonal.min() > 0.03
    assert off_diagonal.max() < 0.05
    assert torch.equal(redraw(clean, 10, 0.0, seed=3), clean)
    assert (redraw(clean, 10, 1.0, seed=3) == clean).float().mean() == pytest.approx(0.1, abs=0.01)


def test_more_noise_keeps_the_labels_that_less_noise_drew():
    clean = torch.zeros(1000, dtype=torch.int64)
    less, more = (redraw(clean, 10, share, seed=1) for share in (0.2, 0.6))
    assert torch.equal(more[less != clean], less[less != clean])
    assert not torch.equal(redraw(clean, 10, 0.6, seed=2), more)


def test_label_noise_spares_validation_and_test_labels():
    clean, data = noisy(label_noise=0.0), noisy(label_noise=1.0)
    for name in ("val_dataloader", "test_dataloader", "predict_dataloader"):
        for a, b in zip(labels_of(getattr(clean, name)()), labels_of(getattr(data, name)()), strict=True):
            assert torch.equal(a, b), name
    samples, labels = labels_of(clean.train_dataloader())
    again, wrong = labels_of(data.train_dataloader())
    assert torch.equal(samples, again)  # the split is by the true labels
    assert (labels != wrong).float().mean() > 0.8
    for a, b in zip(
        labels_of(noisy(label_noise=1.0, validation="test").val_dataloader()),
        labels_of(clean.test_dataloader()),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_samples_label_is_the_same_whatever_split_order_and_process():
    everything = noisy(validation="test", seed=1)
    _, labels = labels_of(everything.train_dataloader())
    for options in ({"seed": 2}, {"split_seed": 5}, {"validation_fraction": 0.5}, {"batch_size": 7, "drop_last": True}):
        samples, own = labels_of(noisy(**options).train_dataloader())
        assert torch.equal(own, labels[samples]), options
    other = labels_of(noisy(validation="test", label_noise_seed=1).train_dataloader())[1]
    assert not torch.equal(other, labels)
    shares = []
    for rank in range(2):
        data = noisy(validation="test", seed=1)
        sampler = EpochSampler(data._train, 1, shuffle=True, world=2, rank=rank)
        shares.append(labels_of(BatchLoader(data._train, 10, sampler)))
    for samples, own in shares:
        assert torch.equal(own, labels[samples])


def test_label_noise_is_known_to_the_run(fake_cifar10):
    for data in (Digits(label_noise=0.3, label_noise_seed=7), CIFAR10(label_noise=0.3, label_noise_seed=7)):
        assert data.hparams["label_noise"] == 0.3
        assert data.hparams["label_noise_seed"] == 7
    clean, noise = (module(root=str(fake_cifar10), validation="none", label_noise=x) for x in (0.0, 1.0))
    assert not torch.equal(labels_of(clean.train_dataloader())[1], labels_of(noise.train_dataloader())[1])


def test_the_seed_is_that_of_seed_everything(monkeypatch):
    assert Digits().seed == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert Digits().seed == 17
    assert Digits(seed=4).seed == 4


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("batch_size", 0, "an integer >= 1"),
        ("eval_batch_size", 0, "an integer >= 1"),
        ("training_samples", 0, "an integer >= 1"),
        ("validation_fraction", 1.0, r"in \(0, 1\)"),
        ("validation", "some", r"one of \('split', 'test', 'none'\)"),
        ("normalisation", "full", r"one of \('unit', 'half', 'standard'\)"),
        ("seed", -1, "an integer >= 0"),
        ("label_noise_seed", -1, "an integer >= 0"),
        ("label_noise", -0.1, r"in \[0, 1\]"),
        ("label_noise", 40, r"in \[0, 1\]"),
        ("label_noise", float("nan"), r"in \[0, 1\]"),
    ],
)
def test_bad_values_are_named(option, value, allowed):
    with pytest.raises(ValueError, match=f"{option} must be {allowed}, got {value!r}"):
        Digits(**{option: value})
