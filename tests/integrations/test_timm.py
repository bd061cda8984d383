"""Networks that timm makes: the same computation as ours, and what timm's scripts ask of a model."""
import pickle

import pytest
import timm
import torch
from networks import close, images, sizes, small
from timm.optim import create_optimizer_v2, param_groups_layer_decay

import mamba2d.integrations.timm  # noqa: F401
from mamba2d.models import Mamba2D, builders, layer_decay_groups, load_published, published_state_dict
from mamba2d.training.recipe import layer_groups

names = [f"mamba2d_{size}" for size in builders]


def create(**options):
    "A small network of timm's making, in evaluation mode, with the values of `small`."
    model = timm.create_model("mamba2d_n", **{"num_classes": 5, **sizes, **options}).eval()
    ours = small(**{"num_classes": model.num_classes, "in_channels": options.get("in_chans", 3)})
    model.load_state_dict(ours.state_dict())
    return model, ours


def test_all_sizes_are_registered():
    assert set(names) <= set(timm.list_models("mamba2d*")) and timm.is_model_pretrained("mamba2d_t")
    for name in names:
        with torch.device("meta"):
            model, ours = timm.create_model(name), builders[name.removeprefix("mamba2d_")]()
        shapes = {key: value.shape for key, value in ours.state_dict().items()}
        assert {key: value.shape for key, value in model.state_dict().items()} == shapes
        assert model.config == ours.config


def test_the_module_has_the_functions_that_timm_lists_in_it():
    public = {}
    exec("from mamba2d.integrations.timm import *", public)
    with torch.device("meta"):
        assert [public[name](num_classes=5).num_classes for name in names] == [5] * len(names)


def test_features_only_equals_forward_features():
    torch.manual_seed(3)
    model = timm.create_model("mamba2d_t", features_only=True).eval()
    ours = Mamba2D(**{**model.model.config, "num_classes": 5}).eval()
    load_published(ours, dict(model.model.state_dict()), backbone_only=True)
    x = images(1)
    with torch.no_grad():
        maps, expected = model(x), ours.forward_features(x)
    assert len(maps) == 4 and all(map(torch.equal, maps, expected))
    assert model.feature_info.channels() == [64, 128, 320, 512]
    assert model.feature_info.reduction() == [4, 8, 16, 32]


def test_chosen_features_leave_no_parameter_unused():
    model = timm.create_model("mamba2d_n", features_only=True, out_indices=(0, 2), **sizes)
    assert model.feature_info.channels() == [16, 64]
    sum(m.square().sum() for m in model(images())).backward()
    assert all(p.grad is not None for p in model.parameters())
    negative = timm.create_model("mamba2d_n", features_only=True, out_indices=(-1,), **sizes)
    assert [tuple(m.shape) for m in negative(images())] == [(2, 96, 2, 2)]


def test_the_head_is_divided_as_timm_does():
    model, ours = create()
    x = images()
    last = model.forward_features(x)
    assert torch.equal(last, ours.forward_features(x)[-1])
    assert torch.equal(model.forward_head(last), model(x)) and torch.equal(model(x), ours(x))
    pooled = model.forward_head(last, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    last_again, maps = model.forward_intermediates(x)
    assert torch.equal(last, last_again) and all(map(torch.equal, maps, ours.forward_features(x)))
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.get_classifier().out_features == 7


def test_num_classes_and_channels():
    assert timm.create_model("mamba2d_n", num_classes=7, **sizes)(images()).shape == (2, 7)
    assert timm.create_model("mamba2d_n", num_classes=0, **sizes)(images()).shape == (2, 96)
    assert timm.create_model("mamba2d_n", in_chans=1, **sizes)(images(channels=1)).shape == (2, 1000)


@pytest.mark.parametrize("form", ("published", "ours", "wrapped"))
def test_pretrained_weights_from_a_file(tmp_path, form):
    source = small(num_classes=1000)
    state = {"published": {"state_dict": published_state_dict(source)}, "ours": source.state_dict(),
             "wrapped": {"state_dict_ema": {"module." + k: v for k, v in source.state_dict().items()}}}[form]
    torch.save(state, tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"))
    model = timm.create_model("mamba2d_n", pretrained=True, pretrained_cfg_overlay=overlay, **sizes).eval()
    assert close(model(images()), source(images()))
    loaded = dict(pretrained=True, pretrained_cfg_overlay=overlay)
    seven = timm.create_model("mamba2d_n", num_classes=7, **loaded, **sizes)
    assert close(seven.eval().forward_features(images()), source.forward_features(images())[-1])
    features = timm.create_model("mamba2d_n", pretrained=True, pretrained_cfg_overlay=overlay,
                                 features_only=True, **sizes).eval()
    assert all(map(close, features(images()), source.forward_features(images())))


@pytest.mark.parametrize("channels", (1, 2, 4, 6))
def test_other_input_channels_are_converted_as_timm_does(tmp_path, channels):
    source = small(num_classes=1000)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"))
    loaded = dict(pretrained=True, pretrained_cfg_overlay=overlay)
    theirs = timm.create_model("mamba2d_n", in_chans=channels, **loaded, **sizes)
    ours = builders["n"](weights=source.state_dict(), in_channels=channels, **sizes)
    name = "stages.0.downsample.conv.weight"
    torch.testing.assert_close(theirs.state_dict()[name], ours.state_dict()[name])


def test_default_cfg_is_the_published_preprocessing():
    model = timm.create_model("mamba2d_n", **sizes)
    assert model.default_cfg["input_size"] == (3, 224, 224) and model.default_cfg["crop_pct"] == 1.
    config = timm.data.resolve_model_data_config(model)
    assert (config["interpolation"], config["mean"]) == ("bicubic", (0.485, 0.456, 0.406))
    assert model.get_submodule(model.default_cfg["classifier"]) is model.get_classifier()
    assert isinstance(model.get_submodule(model.default_cfg["first_conv"]), torch.nn.Conv2d)


@pytest.mark.parametrize("make", (small, lambda: create()[0]))
def test_the_optimizer_leaves_out_what_the_published_regime_leaves_out(make):
    model = make()
    named = {id(p): name for name, p in model.named_parameters()}
    groups = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05).param_groups
    undecayed = {named[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert undecayed == model.no_weight_decay()
    trained = layer_groups(model)
    assert undecayed == {named[id(p)] for group in trained if not group["decay"] for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(named)


@pytest.mark.parametrize("make", (small, lambda: create()[0]))
def test_layer_decay_is_that_of_timm(make):
    model = make()
    theirs, ours = {}, {}
    options = dict(weight_decay=0.05, layer_decay=0.5)
    groups = param_groups_layer_decay(model, no_weight_decay_list=model.no_weight_decay(), **options)
    for group in groups:
        theirs |= {id(p): (group["lr_scale"], group["weight_decay"]) for p in group["params"]}
    for group in layer_decay_groups(model, lr=1., **options):
        ours |= {id(p): (group["lr"], group["weight_decay"]) for p in group["params"]}
    assert ours == theirs
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert sorted(set(coarse.values())) == [0, 1, 2, 3, 4, 5]


def test_checkpointed_gradients_are_identical():
    model = timm.create_model("mamba2d_n", num_classes=5, drop_path_rate=0.5, **sizes)
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(2)
        model(images()).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_a_model_is_pickled():
    model, _ = create()
    assert torch.equal(pickle.loads(pickle.dumps(model))(images()), model(images()))


def test_a_folder_of_timm(tmp_path):
    "What timm writes for its hub is read again from the folder."
    model, _ = create()
    timm.models.save_for_hf(model, tmp_path, model_args={**sizes, "num_classes": 5})
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert close(again(images()), model(images()))
