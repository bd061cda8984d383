"""Grad-CAM by ourselves, by grad-cam and by captum; what the reshape_transform is for."""
import numpy as np
import torch
from captum.attr import LayerGradCam
from networks import correlation, images, small
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from mamba2d.models import Mamba2D
from mamba2d.viz import grad_cam, reshape_transform


def by_grad_cam(model, image, target, stage, transform):
    "The map that the package grad-cam draws."
    with GradCAM(model=model, target_layers=[model.stages[stage]], reshape_transform=transform) as cam:
        return cam(input_tensor=image[None], targets=[ClassifierOutputTarget(target)])[0]


def test_ours_is_that_of_grad_cam():
    model, image = small(), images(1, height=128, width=96)[0]
    for stage in range(4):
        for target in (0, 3):
            theirs = by_grad_cam(model, image, target, stage, reshape_transform)
            ours = grad_cam(model, image, target, stage)
            assert ours.shape == (128, 96) and np.abs(ours.numpy() - theirs).max() < 1e-4, (stage, target)


def test_without_the_transform_the_map_is_wrong():
    "Silently: it has a shape, but another content. On square maps with as many channels nothing could fail."
    torch.manual_seed(0)
    model = Mamba2D(depths=(1, 1), dims=(16, 32), mixers=("m2d", "m2d"), num_classes=5).eval()
    image = images(1, height=64, width=64)[0]
    right, wrong = (by_grad_cam(model, image, 3, 0, transform) for transform in (reshape_transform, None))
    assert correlation(right, grad_cam(model, image, 3, 0)) > 0.999
    assert abs(correlation(right, wrong)) < 0.5


def test_captum_on_the_channels_last_map():
    "captum averages over all axes behind the second: it needs a layer whose map has the channels first."
    model, image = small(), images(1, height=128, width=96)[0]

    class Classifier(torch.nn.Module):
        "The pyramid and the head of the network."
        def __init__(self):
            super().__init__()
            self.features, self.head = model.features(), model.head

        def forward(self, x):
            return self.head(reversed_transform(self.features(x)["3"]))

    def reversed_transform(maps): return maps.permute(0, 2, 3, 1)

    classifier = Classifier().eval()
    assert torch.equal(classifier(image[None]), model(image[None]))
    layer = classifier.features.get_submodule("1")
    attributed = LayerGradCam(classifier, layer).attribute(image[None], 3, relu_attributions=True)[0, 0]
    upsampled = LayerGradCam.interpolate(attributed[None, None], image.shape[1:], "bilinear")
    assert correlation(upsampled, grad_cam(model, image, 3, 1)) > 0.9999
