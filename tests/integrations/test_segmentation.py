"""Networks for dense predictions around ours: segmentation_models_pytorch, fastai, torchvision."""
import pytest
import segmentation_models_pytorch as smp
import torch
from fastai.vision.all import DataLoaders, vision_learner
from networks import images, sizes
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN

import mamba2d.integrations.timm  # noqa: F401
from mamba2d.models import features


def loaders(targets):
    "Eight images in two batches, for training and for validation."
    data = list(zip(images(8, height=64, width=64), targets, strict=True))
    dls = DataLoaders.from_dsets(data, data, bs=4, num_workers=0)
    dls.c = 3
    return dls


@pytest.mark.parametrize("make", (smp.Unet, smp.FPN, smp.UPerNet), ids=lambda make: make.__name__)
def test_decoders_of_segmentation_models_pytorch(make):
    model = make("tu-mamba2d_n", encoder_weights=None, classes=3, in_channels=2, **sizes)
    assert list(model.encoder.out_channels) == [2, 0, 16, 32, 64, 96]
    masks = model(images(channels=2, height=64, width=96))
    assert masks.shape == (2, 3, 64, 96)
    masks.square().sum().backward()
    unused = [name for name, p in model.encoder.named_parameters() if p.grad is None]
    assert unused == []


def test_vision_learner_of_fastai_by_a_name_of_timm():
    dls = loaders(torch.randint(3, (8,)))
    options = dict(n_out=3, pretrained=False, normalize=False, loss_func=nn.CrossEntropyLoss())
    learn = vision_learner(dls, "mamba2d_n", **options)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, lr=1e-3)
    assert learn.model(dls.one_batch()[0]).shape == (4, 3)


def test_a_detector_of_torchvision():
    pyramid = features("mamba2d_n", out_indices=(1, 2, 3), **sizes)
    layers = {name: name for name in ("1", "2", "3")}
    backbone = BackboneWithFPN(pyramid, layers, list(pyramid.channels), out_channels=16)
    assert [tuple(m.shape[1:]) for m in backbone(images()).values()][0] == (16, 8, 5)
    anchors = AnchorGenerator(tuple((size,) for size in (16, 32, 64, 128)), ((0.5, 1., 2.),) * 4)
    detector = FasterRCNN(backbone, 3, min_size=64, max_size=64, rpn_anchor_generator=anchors)
    boxes = [dict(boxes=torch.tensor([[4., 4., 30., 30.]]), labels=torch.tensor([1])) for _ in range(2)]
    losses = detector.train()([*images().sigmoid()], boxes)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in detector.backbone.body.parameters())
    assert {"boxes", "labels", "scores"} == detector.eval()([*images().sigmoid()])[0].keys()
