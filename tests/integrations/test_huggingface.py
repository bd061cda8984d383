"""transformers and huggingface_hub: configurations, folders, the `Auto` classes, and images."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from networks import close, images, small
from PIL import Image
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from mamba2d.integrations import (
    HubMamba2D,
    Mamba2DBackbone,
    Mamba2DConfig,
    Mamba2DForImageClassification,
    config_of,
    image_processor,
    to_transformers,
)
from mamba2d.models import Mamba2D, Mamba2D_N_Weights, load_published


@pytest.fixture
def folder(tmp_path):
    "A folder with the small network as a classifier of transformers."
    to_transformers(small(), id2label=dict(enumerate("abcde"))).save_pretrained(tmp_path)
    image_processor(64).save_pretrained(tmp_path)
    return tmp_path


def test_a_classifier_by_its_folder(folder):
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert type(model) is Mamba2DForImageClassification and model.config.model_type == "mamba2d"
    assert close(model(images()).logits, small()(images()))
    labels = torch.tensor([3, 1])
    output = model(images(), labels=labels, output_hidden_states=True)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    assert all(map(close, output.hidden_states, small().forward_features(images())))
    assert model.config.id2label[output.logits[0].argmax().item()] in "abcde"
    assert close(model(images(), return_dict=False)[0], output.logits)


def test_the_configuration_travels(folder):
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, Mamba2DConfig) and config.num_labels == 5
    assert json.loads((folder / "config.json").read_text())["dims"] == [16, 32, 64, 96]
    version_1 = small(expansion=2, shared_input_matrix=True, rotary=False, alternate_corners=False,
                      downsample_norm=True, stage_norm=False, residual_scale=(False, False, True, True))
    again = Mamba2DForImageClassification(Mamba2DConfig.from_dict(config_of(version_1).to_dict()))
    again.mamba2d.load_state_dict(version_1.state_dict())
    assert close(again.eval()(images()).logits, version_1(images()))


def test_a_new_head_is_initialised(folder):
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_pretrained(
        folder, num_labels=9, ignore_mismatched_sizes=True)
    old, new = small().state_dict(), model.mamba2d.state_dict()
    assert new["head.fc2.weight"].shape == (9, 384) and new["head.fc2.weight"].isfinite().all()
    assert 0 < new["head.fc2.weight"].abs().max() <= 384 ** -0.5
    assert all(torch.equal(new[name], old[name]) for name in old if not name.startswith("head.fc2"))


def test_initial_values_without_a_file():
    model = Mamba2DForImageClassification(config_of(small())).mamba2d
    scan, block = model.stages[0].blocks[0].mixer.scans[0], model.stages[0].blocks[0]
    torch.testing.assert_close(scan.A_log_t.exp(), torch.arange(1., 17).expand(16, 16))
    assert torch.equal(scan.delta_proj_t.bias, scan.delta_proj_l.bias) and (scan.D == 1).all()
    delta = torch.nn.functional.softplus(scan.delta_proj_t.bias)
    assert 9e-4 < delta.min() and delta.max() < 0.101
    assert (block.scale1 == 1).all() and block.mixer.local_path.act1.scale.item() == pytest.approx(0.8944)
    bound = model.head.fc1.in_features ** -0.5
    assert bound * 0.9 < model.head.fc1.weight.abs().max() <= bound


def test_a_backbone_by_its_folder(folder, monkeypatch):
    backbone = Mamba2DBackbone.from_pretrained(folder, out_indices=(0, 2))
    expected = small().forward_features(images())
    assert all(map(close, backbone(images()).feature_maps, [expected[0], expected[2]]))
    assert (backbone.channels, backbone.out_features) == ([16, 64], ["stage1", "stage3"])
    sum(m.sum() for m in backbone(images()).feature_maps).backward()
    assert all(p.grad is not None for p in backbone.parameters())
    # transformers asks the hub whether a name exists before it reads it
    monkeypatch.setattr(transformers.models.auto.auto_factory, "hf_api",
                        lambda: SimpleNamespace(repo_exists=lambda name: True))
    auto = AutoBackbone.from_pretrained(folder, out_features=["stage4"])
    assert type(auto) is Mamba2DBackbone
    assert close(auto(images()).feature_maps[0], expected[3])
    by_config = AutoBackbone.from_config(AutoConfig.from_pretrained(folder, out_indices=(1,)))
    assert by_config(images()).feature_maps[0].shape == expected[1].shape


def test_a_detector_of_transformers_takes_the_backbone(folder):
    "DETR builds its backbone from our configuration."
    config = AutoConfig.from_pretrained(folder, out_indices=(3,))
    sizes = dict(encoder_layers=1, decoder_layers=1, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16,
                 encoder_attention_heads=2, decoder_attention_heads=2, num_queries=4)
    detr_config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=config,
        **sizes)
    detr = transformers.DetrForObjectDetection(detr_config)
    assert any(isinstance(module, Mamba2DBackbone) for module in detr.modules())
    assert detr.eval()(images(1)).pred_boxes.shape == (1, 4, 4)


def test_images_are_those_of_the_weights(folder):
    processor = AutoImageProcessor.from_pretrained(folder)
    assert processor.crop_size["height"] == 64
    picked = image_processor()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((400, 300), Image.Resampling.BICUBIC)  # smooth, as images are
    theirs = picked(image, return_tensors="pt")["pixel_values"][0]
    ours = Mamba2D_N_Weights.DEFAULT.transforms()(image)
    assert theirs.shape == ours.shape == (3, 224, 224)
    assert (theirs - ours).abs().max() < 0.06  # three gray values: both round to bytes, in another place


def test_checkpointing_and_the_trainer(folder, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(folder)
    model.gradient_checkpointing_enable()
    assert all(stage.grad_checkpointing for stage in model.mamba2d.stages)
    model.gradient_checkpointing_disable()
    assert not any(stage.grad_checkpointing for stage in model.mamba2d.stages)
    data = [dict(pixel_values=image, labels=k % 5) for k, image in enumerate(images(8))]
    arguments = transformers.TrainingArguments(tmp_path / "out", max_steps=2, per_device_train_batch_size=4,
                                               report_to=[], use_cpu=True, gradient_checkpointing=True)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    before = model.mamba2d.head.fc2.weight.detach().clone()
    assert np.isfinite(trainer.train().training_loss)
    assert not torch.equal(model.mamba2d.head.fc2.weight, before)


def test_our_loader_reads_the_folder(folder):
    fresh = load_published(Mamba2D(**small().config), folder / "model.safetensors").eval()
    assert close(fresh(images()), small()(images()))


class Uploads:
    "Stands for the hub: what would be uploaded is copied to a folder."
    def __init__(self, folder):
        self.folder, self.token, self.calls = folder, None, []

    def create_repo(self, repo_id, **kwargs):
        self.calls.append(("create_repo", repo_id))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, folder_path, repo_id, **kwargs):
        shutil.copytree(folder_path, self.folder, dirs_exist_ok=True)
        self.calls.append(("upload_folder", repo_id))

    def create_commit(self, repo_id, operations, **kwargs):
        self.folder.mkdir()
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, self.folder / operation.path_in_repo)
        self.calls.append(("create_commit", repo_id))


def test_the_plain_class_and_the_hub(tmp_path, monkeypatch):
    plain = HubMamba2D(**small().config)
    plain.load_state_dict(small().state_dict())
    plain.save_pretrained(tmp_path / "local")
    loaded = HubMamba2D.from_pretrained(tmp_path / "local")
    assert close(loaded(images()), small()(images())) and loaded.config == small().config
    hub = Uploads(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_api", lambda **kwargs: hub, raising=False)
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", lambda **kwargs: hub, raising=False)
    plain.push_to_hub("owner/mamba2d-small")
    assert hub.calls[0] == ("create_repo", "owner/mamba2d-small")
    assert close(HubMamba2D.from_pretrained(tmp_path / "hub")(images()), small()(images()))


def test_a_classifier_is_pushed_to_the_hub(folder, tmp_path, monkeypatch):
    model, hub = AutoModelForImageClassification.from_pretrained(folder), Uploads(tmp_path / "hub")
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    card = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: card)
    model.push_to_hub("owner/mamba2d-small")
    assert hub.calls == [("create_repo", "owner/mamba2d-small"), ("create_commit", "owner/mamba2d-small")]
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "hub")
    assert close(again(images()).logits, model(images()).logits)
