"""Adapters, quantisation and pruning of every linear layer, those of the step sizes included."""
import copy

import peft
import pytest
import torch
import torchao.quantization
from networks import close, images, small
from torch import nn
from torch.nn.utils import prune

from mamba2d.models import DeltaProjection

delta_layers = ["delta_proj_t", "delta_proj_l"]

every_kind = pytest.mark.parametrize(
    "options", ({}, {"use_dora": True}, {"lora_bias": True}), ids=("lora", "dora", "bias"))


def adapted(**options):
    "The small network with adapters at the layers of the step sizes, and the same network without."
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=delta_layers, init_lora_weights=False, **options)
    return peft.get_peft_model(small(), config).eval(), small()


def scans(model):
    return [module for module in model.modules() if type(module).__name__ == "SelectiveScan"]


@every_kind
def test_lora_takes_effect_everywhere(options):
    model, plain = adapted(**options)
    model(images()).square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum("delta_proj" in name for name in trained) >= 2 * 2 * len(scans(model))
    for name, parameter in trained.items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert (model(images()) - plain(images())).abs().max() > 1e-5


@every_kind
def test_merged_adapters_compute_the_same(options):
    model, plain = adapted(**options)
    before = model(images())
    with model.disable_adapter():
        torch.testing.assert_close(model(images()), plain(images()), rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    layers = [getattr(scan, name) for scan in scans(merged) for name in delta_layers]
    assert all(isinstance(layer, DeltaProjection) for layer in layers)
    torch.testing.assert_close(merged(images()), before, rtol=1e-4, atol=1e-5)


def test_every_linear_layer_can_be_adapted():
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(small(), config)
    model(images()).square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layers = [name for name, module in small().named_modules() if isinstance(module, nn.Linear)]
    assert len(trained) == 2 * len(layers)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())


def test_ia3_scales_and_merges():
    config = peft.IA3Config(target_modules=delta_layers, feedforward_modules=[], init_ia3_weights=False)
    model = peft.get_peft_model(small(), config).eval()
    before = model(images())
    assert not torch.allclose(before, small()(images()), atol=1e-4)
    torch.testing.assert_close(model.merge_and_unload()(images()), before, rtol=1e-4, atol=1e-5)


def test_modules_to_save_train_the_whole_layer():
    config = peft.LoraConfig(r=2, target_modules=["x_proj"], modules_to_save=delta_layers)
    model = peft.get_peft_model(small(), config)
    torch.testing.assert_close(model(images()), small()(images()), rtol=1e-4, atol=1e-5)
    model(images()).square().sum().backward()
    saved = [p for name, p in model.named_parameters() if "modules_to_save.default" in name]
    assert len(saved) == 2 * 2 * len(scans(model)) and all(p.grad.abs().sum() > 0 for p in saved)


def test_an_adapter_is_saved_and_loaded(tmp_path):
    model, _ = adapted()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(small(), tmp_path).eval()
    assert close(again(images()), model(images()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantisation():
    plain = small()
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(plain), {nn.Linear})
    kinds = {name: type(module) for name, module in quantized.named_modules()}
    scan = "stages.0.blocks.0.mixer.scans.0"
    assert kinds[f"{scan}.x_proj"] is torch.ao.nn.quantized.dynamic.Linear
    assert kinds[f"{scan}.delta_proj_t"] is DeltaProjection  # no nn.Linear: it stays as it is
    error = (quantized(images()) - plain(images())).norm() / plain(images()).norm()
    assert 0 < error < 0.1


def test_torchao_quantises_the_layers_of_the_step_sizes_too():
    plain, quantized = (small(dims=(32, 64, 64, 96)) for _ in range(2))
    torchao.quantization.quantize_(quantized, torchao.quantization.Int8WeightOnlyConfig())
    layer = scans(quantized)[0].delta_proj_t
    assert type(layer.weight) is not nn.Parameter and "Int8" in repr(type(layer.weight)) + repr(layer.weight)
    error = (quantized(images()) - plain(images())).norm() / plain(images()).norm()
    assert 0 < error < 0.1
    few = torch.eye(layer.in_features)
    assert not torch.equal(layer(few), scans(plain)[0].delta_proj_t(few))


def test_a_pruned_network_trains_and_loads():
    model = small()
    layers = [(module, "weight") for module in model.modules() if isinstance(module, nn.Linear)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=0.5)
    for _ in range(2):
        model(images()).square().sum().backward()
    scan = scans(model)[0]
    kept = scan.delta_proj_t.weight_mask.bool()
    assert scan.delta_proj_t.weight_orig.grad[~kept].abs().sum() == 0
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["stages.0.blocks.0.mixer.scans.0.delta_proj_t.weight_orig"] *= -1
    before = model(images())
    model.load_state_dict(state)
    assert not torch.allclose(model(images()), before, atol=1e-5)
