import pytest
import torch
from torch.utils.data import DataLoader

from doors import as_it_is, assert_sharp

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True, scope="module")
def trainers():
    return pytest.importorskip("torchgeo.trainers")


def scenes():
    """Three training batches of two scenes and one for validation, as torchgeo collates them: dictionaries."""

    def loader(batches):
        samples = [{"image": torch.rand(3, 32, 32), "mask": torch.randint(3, (32, 32))} for _ in range(2 * batches)]
        return DataLoader(samples, batch_size=2)

    return {"train_dataloaders": loader(3), "val_dataloaders": loader(1)}


def test_semantic_segmentation(trainers, tmp_path):
    """AdamW, a plateau scheduler on `val_loss` that steps at once, metrics updated in the step."""

    def task(made_from=as_it_is):
        cls = made_from(trainers.SemanticSegmentationTask)
        return cls(model="fcn", in_channels=3, num_classes=3, num_filters=8, lr=1e-2, patience=0)

    assert_sharp(task, scenes, tmp_path)


def boxes():
    """Two training batches of two images with two boxes each, one for validation."""
    box = torch.tensor([[4.0, 4.0, 30.0, 40.0], [20.0, 10.0, 60.0, 50.0]])

    def loader(batches):
        samples = [
            {"image": torch.rand(3, 64, 64), "bbox_xyxy": box, "label": torch.randint(1, 3, (2,))}
            for _ in range(2 * batches)
        ]
        return DataLoader(samples, batch_size=2, collate_fn=listed)

    return {"train_dataloaders": loader(2), "val_dataloaders": loader(1)}


def listed(rows):
    batch = {key: [row[key] for row in rows] for key in rows[0]}
    return {**batch, "image": torch.stack(batch["image"])}


def test_object_detection(trainers, tmp_path):
    """Faster R-CNN: proposals are drawn at random in every pass."""

    def task(made_from=as_it_is):
        cls = made_from(trainers.ObjectDetectionTask)
        made = cls(model="faster-rcnn", backbone="resnet18", in_channels=3, num_classes=3, lr=1e-3, patience=0)
        made.model.transform.min_size, made.model.transform.max_size = (64,), 64
        few = {"training": 20, "testing": 20}
        made.model.rpn._pre_nms_top_n, made.model.rpn._post_nms_top_n = few, few
        made.model.roi_heads.fg_bg_sampler.batch_size_per_image = 8
        return made

    assert_sharp(task, boxes, tmp_path, doors=["callback"])
