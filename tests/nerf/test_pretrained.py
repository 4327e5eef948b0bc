"""The weights that come with the package, and what renders scenes with them."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("nerfstudio")

from shiftadd3d import UserError, cli
from shiftadd3d.configs import pretrained
from shiftadd3d.models.gnt import GNTModel
from shiftadd3d.nerf.pretrained import open_scene
from shiftadd3d.nerf.warm_start import load_dense_weights
from shiftadd3d.nerf.weights import load_network, pretrained_file, pretrained_methods, read_weights
from shiftadd3d.nn import FrozenModule, PackedShiftLinear

SIZE = (64, 48)
METHODS = {method.name: method for method in (pretrained.gnt_tiny, pretrained.shiftadd_gnt_tiny)}
DEPTHS = {"near": 2.0, "far": 8.0}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, write_scene) -> Path:
    return write_scene["nerfstudio"](tmp_path_factory.mktemp("scene"), size=SIZE, shiftadd3d=DEPTHS)


def test_both_tiny_methods_have_weights_well_under_a_megabyte():
    assert pretrained_methods() == sorted(METHODS)
    for method in METHODS:
        assert pretrained_file(method).stat().st_size < 1e6


def test_weights_of_shifts_are_stored_as_codes():
    tensors, facts = read_weights(pretrained_file("shiftadd-gnt-tiny"))
    assert facts["packed"] == "true" and int(facts["steps"]) > 0
    assert any(tensor.dtype == torch.uint8 for tensor in tensors.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_network_loaded_without_nerfstudio_is_the_one_that_nerfstudio_gets(method, scene):
    expected = open_scene(METHODS[method], scene).model.gnt
    network = load_network(method)
    assert [type(module) for module in network.modules()] == [type(module) for module in expected.modules()]
    for name, value in expected.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name


def test_a_method_without_weights_is_refused_with_those_that_have_some():
    with pytest.raises(UserError, match=r"no weights of gnt-big .*expected one of: gnt-tiny, shiftadd-gnt-tiny"):
        load_network("gnt-big")


@pytest.mark.parametrize("method", METHODS)
def test_a_scene_renders_without_training(method, scene):
    opened = open_scene(METHODS[method], scene)
    packed = [module for module in opened.model.modules() if isinstance(module, PackedShiftLinear)]
    assert bool(packed) == (method == "shiftadd-gnt-tiny")
    blocks = [module for module in opened.model.modules() if isinstance(module, FrozenModule)]
    assert len(blocks) == 9, "all of the network is ready to run as kernels, dense or not"
    assert len(opened.bank) == 10, "no view is held out"
    near, far = opened.model.near_far.tolist()
    assert far / near == pytest.approx(4.0, rel=1e-3)
    out = opened.model.get_outputs_for_camera(opened.views.cameras[0:1])
    assert out["rgb"].shape == (48, 64, 3) and bool(out["rgb"].isfinite().all())
    assert float(out["rgb"].std()) > 0.01


def test_views_are_shrunk_to_the_longest_side_asked_for(scene):
    opened = open_scene(METHODS["gnt-tiny"], scene, max_side=48)
    assert (opened.bank.width, opened.bank.height) == (48, 36)


@pytest.mark.parametrize("size", [(44, 33), (33, 44), (38, 30)])
@pytest.mark.parametrize("longest", [26, 27, 30])
def test_shrunk_views_are_as_large_as_their_cameras(write_scene, tmp_path, size, longest):
    # 44 * (30 / 44) is 30 in float64, and a little less in the float32 of cameras.
    opened = open_scene(METHODS["gnt-tiny"], write_scene["nerfstudio"](tmp_path, size=size), max_side=longest)
    cameras = opened.views.cameras
    assert int(torch.maximum(cameras.width, cameras.height).max()) == longest
    assert (opened.bank.width, opened.bank.height) == (int(cameras.width[0]), int(cameras.height[0]))


def test_the_methods_configuration_stays_as_it_is(scene):
    before = copy.deepcopy(METHODS["gnt-tiny"].model)
    open_scene(METHODS["gnt-tiny"], scene, max_side=48)
    assert METHODS["gnt-tiny"].model == before


def test_a_scene_of_two_views_is_refused(tmp_path, write_scene):
    with pytest.raises(UserError, match="has 2 views to render from; expected at least 3"):
        open_scene(METHODS["gnt-tiny"], write_scene["nerfstudio"](tmp_path, count=2, size=SIZE))


def test_a_method_without_weights_is_refused():
    with pytest.raises(UserError, match=r"no weights of gnt-big come with this package; expected one of: gnt-tiny, "):
        pretrained_file("gnt-big")


def damaged(kind: str) -> bytes:
    """What a file of that name should not hold."""
    if kind == "pickle":
        file = io.BytesIO()
        torch.save(load_file(pretrained_file("gnt-tiny")), file)
        return file.getvalue()
    whole = pretrained_file("gnt-tiny").read_bytes()
    return {"empty": b"", "bytes": b"\x80\x04not safetensors" * 20, "truncated": whole[:-1000]}[kind]


@pytest.mark.parametrize("kind", ["empty", "bytes", "truncated", "pickle"])
def test_a_damaged_file_is_one_line(tmp_path, scene, kind):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(damaged(kind))
    with pytest.raises(UserError, match=r"weights\.safetensors cannot be read") as caught:
        open_scene(METHODS["gnt-tiny"], scene, weights=path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"weights\.safetensors cannot be read") as caught:
        load_dense_weights(GNTModel(METHODS["gnt-tiny"].model.gnt), path)
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_refused(tmp_path, scene):
    tensors = load_file(pretrained_file("gnt-tiny"))
    tensors.popitem()
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match=r"holds another network than this method's .1 tensors missing, 0 strange"):
        open_scene(METHODS["gnt-tiny"], scene, weights=tmp_path / "short.safetensors")


@pytest.mark.parametrize("name", ["pretrained", "file"])
def test_training_may_start_from_them(name):
    gnt = GNTModel(METHODS["gnt-tiny"].model.gnt)
    file = pretrained_file("gnt-tiny")
    load_dense_weights(gnt, Path("pretrained") if name == "pretrained" else file)
    for key, value in load_file(file).items():
        assert torch.equal(gnt.state_dict()[key], value.float())


# --------------------------------------------------------------------------------------------------------------------
# eval-scenes
# --------------------------------------------------------------------------------------------------------------------


def test_eval_scenes_makes_a_table_of_what_can_be_read(tmp_path, write_scene, capsys):
    for name in ("a", "b"):
        write_scene["nerfstudio"](tmp_path / "scenes" / name, size=SIZE, shiftadd3d=DEPTHS)
    broken = write_scene["nerfstudio"](tmp_path / "scenes/c", size=SIZE)
    (broken / "images/000.png").unlink()
    out = tmp_path / "table.json"
    assert cli.main(["eval-scenes", "--scenes", str(tmp_path / "scenes"), "--json", str(out)]) == 0
    facts = json.loads(out.read_text())
    assert [row["scene"] for row in facts["scenes"]] == ["a", "b"]
    assert list(facts["skipped"]) == [str(broken)]
    for row in facts["scenes"]:
        assert row["views"] == 1 and 0 < row["psnr"] < 60 and row["seconds_per_view"] > 0
    told = capsys.readouterr().out
    assert "left out" in told and f"{facts['scenes'][0]['psnr']:.2f}" in told


def test_eval_scenes_takes_a_run(tmp_path, tiny_run, write_scene):
    other = write_scene["nerfstudio"](tmp_path / "other", size=SIZE, shiftadd3d=DEPTHS)
    out = tmp_path / "table.json"
    args = ["eval-scenes", "--scenes", str(other), "--load-config", str(tiny_run), "--json", str(out)]
    assert cli.main(args) == 0
    facts = json.loads(out.read_text())
    assert [row["scene"] for row in facts["scenes"]] == ["other"] and "step-" in facts["network"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--scenes", "nowhere"], "--scenes nowhere: no such file or folder; expected scene folders"),
        (["--scenes", "scene", "--max-side", "0"], "--max-side 0: expected 1 or more"),
        (["--scenes", "scene", "--load-config", "nowhere.yml"], "nowhere.yml: no such file"),
    ],
)
def test_eval_scenes_says_in_one_line_what_is_wrong(tmp_path, write_scene, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    write_scene["nerfstudio"](tmp_path / "scene", size=SIZE)
    assert cli.main(["eval-scenes", *args]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_views_from_all_around_say_where_nothing_is_but_never_the_one_to_be_predicted(write_scene, tmp_path):
    scene = write_scene["nerfstudio"](tmp_path, mode="RGBA", size=SIZE)
    method = METHODS["gnt-tiny"]
    opened = open_scene(method, scene)
    bank, cameras = opened.bank, opened.views.cameras
    assert bank.empty is not None

    def depth() -> torch.Tensor:
        return opened.model.get_outputs_for_camera(cameras[0:1])["depth"]

    far = int(bank.nearest(bank.camera_to_world[0], len(bank))[-1])
    assert far not in bank.nearest(bank.camera_to_world[0], method.num_source_views)
    before = depth()
    bank.empty[0] = ~bank.empty[0]
    torch.testing.assert_close(depth(), before)
    bank.empty[far, :, :24] = True
    assert not torch.allclose(depth(), before)
