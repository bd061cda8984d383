"""Programs of torch.export that run in a process without mamba2d."""
import pytest
import torch
from published import corners, published, tiny, unseen

from mamba2d.cli import export
from mamba2d.models import Mamba2D, check_file, export_model, save_package, save_pt2


def written(size, model, folder):
    "The file of a published network: that of M2D-N by the command, the others by the function."
    path = folder / "program.pt2"
    if size != "n":
        return save_pt2(model, path)
    torch.save({"model": model.state_dict(), "config": {"size": "n"}}, folder / "weights.pth")
    export([str(folder / "weights.pth"), "--pt2", str(path), "--no-check"])
    return path


@pytest.mark.parametrize("size", ("n", "t", "t_v1"))
def test_published_networks_run_without_mamba2d(size, tmp_path):
    model = published(size)
    assert corners(model) == ({False} if size == "t_v1" else {False, True})
    checks = check_file(written(size, model, tmp_path), model, shapes=unseen)
    assert [check.shape[0] for check in checks] == [1, 3, 1]
    assert max(check.difference for check in checks) < 1e-4
    assert min(check.scale for check in checks) > .1


def test_the_check_sees_other_weights(tmp_path):
    path = save_pt2(tiny(), tmp_path / "program.pt2")
    other = tiny()
    torch.nn.init.normal_(other.stages[0].blocks[0].mixer.scans[0].x_proj.weight)
    assert check_file(path, other, shapes=unseen[:1])[0].difference > 1e-3


def test_a_program_with_the_operator_does_not_run_without_mamba2d(tmp_path):
    torch.export.save(export_model(tiny(), decompose=False), tmp_path / "program.pt2")
    with pytest.raises(RuntimeError, match="cannot run in a process without mamba2d"):
        check_file(tmp_path / "program.pt2", tiny(), shapes=unseen[:1])


def test_half(tmp_path):
    path = save_pt2(tiny(), tmp_path / "program.pt2", half=True)
    for check in check_file(path, tiny(), half=True, shapes=unseen):
        assert check.difference < 1e-2 * max(1, check.scale)


def test_the_pyramid(tmp_path):
    features = tiny().features(out_indices=(0, 1))
    path = save_pt2(features.eval(), tmp_path / "program.pt2")
    assert max(check.difference for check in check_file(path, features, shapes=unseen)) < 1e-4


def test_averaged_scans_without_a_local_path(tmp_path):
    model = tiny(scans=2, local_path=False)
    assert corners(model) == {False, True}
    path = save_pt2(model, tmp_path / "program.pt2")
    assert max(check.difference for check in check_file(path, model, shapes=unseen)) < 1e-4


def test_package_of_the_compiler(tmp_path):
    torch.manual_seed(0)
    model = Mamba2D((1,), (16,), ("m2d",), num_classes=3, local_path=False).eval()
    package = torch._inductor.aoti_load_package(str(save_package(model, tmp_path / "package.pt2")))
    for batch, height, width in unseen:
        images = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(package(images), model(images))
