"""What `mamba2d-convert` writes is what the other libraries read."""
import pytest
import timm
import torch
from networks import close, images
from transformers import AutoImageProcessor, AutoModelForImageClassification

import mamba2d.integrations.timm  # noqa: F401
from mamba2d.cli import convert
from mamba2d.cli.common import run_captured
from mamba2d.integrations import HubMamba2D
from mamba2d.models import builders, published_state_dict


@pytest.fixture(scope="module", params=("n", "t_v1"))
def source(request, tmp_path_factory):
    "A network with another number of classes, and a checkpoint of it under the published names."
    torch.manual_seed(0)
    model = builders[request.param](num_classes=3).eval()
    path = tmp_path_factory.mktemp("published") / "published.ckpt"
    torch.save({"state_dict": published_state_dict(model), "epoch": 299}, path)
    return request.param, path, model


@pytest.mark.parametrize("form", ("timm", "transformers", "hub"))
def test_each_form_is_read_by_its_library(source, form, tmp_path):
    size, path, model = source
    code, out, err = run_captured(convert, path, "--size", size, "--to", form, "--out", tmp_path / form)
    assert code == 0 and "every number is the same" in out, err
    with torch.no_grad():
        expected = model(images(1))
        if form == "timm":
            read = timm.create_model(f"local-dir:{tmp_path / form}", pretrained=True).eval()(images(1))
        elif form == "transformers":
            read = AutoModelForImageClassification.from_pretrained(tmp_path / form)(images(1)).logits
            assert AutoImageProcessor.from_pretrained(tmp_path / form).crop_size["height"] == 224
        else:
            read = HubMamba2D.from_pretrained(tmp_path / form)(images(1))
    assert close(read, expected)
