"""integrations/nerfbaselines: a dataset to a scene, training, and checkpoints that need no training set.

NerfBaselines wants a numpy that the lock does not have. Where it is not installed, all but the last test run with the
three names that the integration takes from it.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import CameraType
from PIL import Image

from shiftadd3d._errors import UserError
from shiftadd3d.configs import methods

MODELS = ("pinhole", "opencv", "opencv_fisheye", "full_opencv")
SMALL = {
    "method": "shiftadd-gnt-tiny",
    "pipeline.warm_start": "none",
    "pipeline.model.gnt.depth": "1",
    "pipeline.model.gnt.width": "16",
    "pipeline.model.gnt.proposal_samples": 8,
    "pipeline.model.gnt.feature_widths": "8,8,8",
    "pipeline.model.gnt.feature_dim": 8,
    "pipeline.model.num_samples": 4,
    "pipeline.datamanager.judged_views": 0,  # a few steps make nothing better, and the weights from before are kept
    "pipeline.model.expert_latencies": [1.0, 1.0],
    "pipeline.datamanager.num_source_views": 3,
    "pipeline.datamanager.train_num_rays_per_batch": 64,
    "max_num_iterations": 4,
}


@dataclass
class Views:
    """NerfBaselines' cameras, as far as a method meets them."""

    poses: np.ndarray
    intrinsics: np.ndarray
    camera_models: np.ndarray
    distortion_parameters: np.ndarray
    image_sizes: np.ndarray
    nears_fars: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.poses)

    def __getitem__(self, index: Any) -> Views:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return Views(**{name: None if value is None else value[index] for name, value in values.items()})

    def item(self) -> Views:
        return self if self.poses.ndim == 2 else self[0]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(repository: Path) -> Path:
    return repository / "integrations/nerfbaselines"


@pytest.fixture(scope="module")
def integration(folder: Path) -> ModuleType:
    """shiftadd_gnt.py."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("nerfbaselines") is None:
            stand_in = ModuleType("nerfbaselines")
            vars(stand_in).update(Method=object, camera_model_from_int=MODELS.__getitem__)
            patch.setitem(sys.modules, "nerfbaselines", stand_in)
        return load(folder / "shiftadd_gnt.py")


@pytest.fixture
def spec(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What shiftadd_gnt_spec.py registers."""
    registered: list[dict[str, Any]] = []
    stand_in = ModuleType("nerfbaselines")
    vars(stand_in).update(register=registered.append)
    monkeypatch.setitem(sys.modules, "nerfbaselines", stand_in)
    load(folder / "shiftadd_gnt_spec.py")
    (found,) = registered
    return found


@pytest.fixture(scope="session")
def make_dataset(orbit_poses: Callable[..., np.ndarray]) -> Callable[..., dict[str, Any]]:
    """`make_dataset(count, channels, ...)`: views of noise on a circle, near 2 and far 8."""

    def make(count: int = 6, channels: int = 3, size: tuple[int, int] = (64, 48), **more: Any) -> dict[str, Any]:
        random = np.random.default_rng(0)
        poses = (orbit_poses(count) @ np.diag([1.0, -1.0, -1.0, 1.0]))[:, :3].astype(np.float32)
        width, height = size
        cameras = {
            "poses": poses,
            "intrinsics": np.tile(np.float32([50.0, 50.0, width / 2, height / 2]), (count, 1)),
            "camera_models": np.zeros(count, dtype=np.int32),
            "distortion_parameters": np.zeros((count, 0), dtype=np.float32),
            "image_sizes": np.tile(np.int32(size), (count, 1)),
            "nears_fars": np.tile(np.float32([2.0, 8.0]), (count, 1)),
        }
        dataset: dict[str, Any] = {
            "images": random.integers(0, 256, (count, height, width, channels), dtype=np.uint8),
            "masks": None,
            "metadata": {"color_space": "srgb"},
        }
        cameras |= {name: more.pop(name) for name in list(more) if name in cameras}
        return {**dataset, **more, "cameras": Views(**cameras)}

    return make


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Settings


def test_presets_name_settings_that_there_are_and_fit_their_datasets(spec: dict[str, Any], integration: ModuleType):
    assert spec["id"] == "shiftadd-gnt"
    assert spec["method_class"] == "shiftadd_gnt:ShiftAddGNT" and hasattr(integration, "ShiftAddGNT")
    presets = {
        name: {key: value for key, value in preset.items() if key[0] != "@"} for name, preset in spec["presets"].items()
    }
    applied = {name: preset["@apply"] for name, preset in spec["presets"].items() if "@apply" in preset}
    assert applied == {"blender": [{"dataset": "blender"}], "llff": [{"dataset": "llff"}]}
    for name in applied:
        config = integration.configured(presets[name])
        assert config.method_name == "shiftadd-gnt"
        assert config.pipeline.datamanager.train_num_rays_per_batch == 2048
        # Named together, the preset for CPUs counts: it comes last.
        merged: dict[str, Any] = {}
        for each in presets:
            if each in (name, "shiftadd-gnt-tiny"):
                merged |= presets[each]
        assert integration.configured(merged) == methods.shiftadd_gnt_tiny.config


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_num_iterations", "12", 12),
        ("pipeline.model.color_error", "rmse", "rmse"),
        ("pipeline.model.inverse_depth", "false", False),
        ("pipeline.datamanager.near", "0.5", 0.5),
        ("pipeline.datamanager.near", None, None),
        ("pipeline.datamanager.train_source_views", "4,8", (4, 8)),
        ("pipeline.model.expert_latencies", [1.0, 2.0], (1.0, 2.0)),
        ("pipeline.warm_start", "none", Path("none")),
        ("pipeline.model.gnt.width", 32, 32),
        ("optimizers.transformers.optimizer.lr", 1e-5, 1e-5),
    ],
)
def test_a_setting_is_read_as_on_the_command_line(name: str, value: Any, expected: Any, integration: ModuleType):
    found: Any = integration.configured({name: value})
    for part in name.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == expected and type(found) is type(expected)
    default: Any = integration.configured({})
    assert default == methods.shiftadd_gnt.config  # which was not changed itself


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"method": "nerfacto"}, "method is 'nerfacto'; expected one of: gnt, "),
        ({"pipeline.model.num_sample": 3}, "no setting pipeline.model.num_sample: expected pipeline.model.num_samples"),
        ({"max_num_iteration": 3}, "no setting max_num_iteration: expected max_num_iterations"),
        ({"max_num_iterations.more": 3}, "no setting max_num_iterations.more: max_num_iterations has none in it"),
        ({"optimizers.transformers": 3}, "no setting optimizers.transformers: optimizers has none in it"),
        ({"pipeline.model.num_samples": "many"}, "pipeline.model.num_samples is 'many'; expected int"),
        ({"pipeline.model": 3}, "pipeline.model is 3; expected "),
        ({"pipeline.datamanager.data": "x"}, "pipeline.datamanager.data follows from the dataset"),
        ({"pipeline.datamanager.dataparser.eval_mode": "all"}, "follows from the dataset and the checkpoint"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(overrides: dict[str, Any], message: str, integration: ModuleType):
    with pytest.raises(UserError) as error:
        integration.configured(overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


# Datasets


def test_a_dataset_becomes_a_scene_with_its_cameras_sizes_masks_and_points(
    make_dataset: Callable[..., dict[str, Any]], integration: ModuleType, tmp_path: Path
):
    sizes = np.int32([[64, 48], [60, 40], [64, 48], [64, 48]])
    masks = [np.ones((height, width), dtype=bool) for width, height in sizes]
    masks[2][:10] = False
    dataset = make_dataset(
        count=4,
        channels=4,
        image_sizes=sizes,
        intrinsics=np.float32([[50, 51, width / 2 + 1, height / 2 - 1] for width, height in sizes]),
        camera_models=np.int32([0, 1, 2, 1]),
        distortion_parameters=np.tile(np.float32([0.1, 0.02, 0.003, 0.004, 0.005, 0.006]), (4, 1)),
        nears_fars=np.float32([[2, 8], [3, 9], [2, 8], [2, 8]]),
        masks=masks,
        points3D_xyz=np.float32([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]),
    )
    integration.write_scene(dataset, tmp_path / "scene")
    parser = integration.SceneWithPointsParserConfig(data=tmp_path / "scene", eval_mode="all").setup()
    outputs = parser.get_dataparser_outputs("train")

    cameras = outputs.cameras
    flat = [torch.cat([cameras.fx, cameras.fy, cameras.cx, cameras.cy], dim=1), cameras.distortion_params]
    np.testing.assert_array_equal(flat[0], dataset["cameras"].intrinsics)
    np.testing.assert_array_equal(torch.cat([cameras.width, cameras.height], dim=1), sizes)
    assert cameras.camera_type[:, 0].tolist() == [
        *(CameraType.PERSPECTIVE.value, CameraType.PERSPECTIVE.value),
        *(CameraType.FISHEYE.value, CameraType.PERSPECTIVE.value),
    ]
    k1, k2, p1, p2, k3, k4 = 0.1, 0.02, 0.003, 0.004, 0.005, 0.006
    expected = [[0.0] * 6, [k1, k2, k3, k4, p1, p2], [k1, k2, k3, k4, 0.0, 0.0], [k1, k2, k3, k4, p1, p2]]
    np.testing.assert_allclose(flat[1], expected, rtol=1e-6)

    back = outputs.transform_poses_to_original_space(cameras.camera_to_worlds, "opencv")
    np.testing.assert_allclose(back[:, :3, 3], dataset["cameras"].poses[:, :, 3], atol=1e-5)
    np.testing.assert_allclose(back[:, :3, 2], dataset["cameras"].poses[:, :, 2], atol=1e-6)
    # The margins of LLFF's bounds: they differ from view to view.
    np.testing.assert_allclose(
        np.array(outputs.metadata["near_far"]) / outputs.dataparser_scale, [0.9 * 2, 1.1 * 9], rtol=1e-6
    )
    points = outputs.metadata["points3D_xyz"].double() / outputs.dataparser_scale
    turn, shift = outputs.dataparser_transform[:, :3], outputs.dataparser_transform[:, 3]
    np.testing.assert_allclose((points - shift) @ turn, dataset["points3D_xyz"], atol=1e-5)

    for index, (path, (width, height)) in enumerate(zip(outputs.image_filenames, sizes, strict=True)):
        np.testing.assert_array_equal(Image.open(path), dataset["images"][index, :height, :width])
    for path, mask in zip(outputs.mask_filenames, masks, strict=True):
        np.testing.assert_array_equal(np.array(Image.open(path)) > 127, mask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"color_space": "linear"}}, "color_space is linear; expected srgb"),
        ({"camera_models": np.int32([0, 0, 3, 0])}, "model is full_opencv; expected one of: pinhole, opencv"),
        ({"images": None}, "no pictures; expected one that was read with load_features=True"),
        ({"count": 2}, "2 views to train on; expected at least 3"),
        ({"intrinsics": np.zeros((4, 4), dtype=np.float32)}, "camera parameter fx is 0"),
    ],
)
def test_a_dataset_that_cannot_be_trained_on_is_refused_in_one_line(
    changes: dict[str, Any], message: str, make_dataset: Callable[..., dict[str, Any]], integration: ModuleType
):
    with pytest.raises(UserError) as error:
        integration.ShiftAddGNT(train_dataset=make_dataset(**{"count": 4, **changes}), config_overrides=SMALL)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "shiftadd-gnt-" not in str(error.value)  # the folder that it was written to


# Training and checkpoints


@pytest.fixture(scope="module")
def dataset(make_dataset: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return make_dataset(channels=4, metadata={"color_space": "srgb", "background_color": np.uint8([255, 255, 255])})


@pytest.fixture(scope="module")
def method(integration: ModuleType, dataset: dict[str, Any]) -> Any:
    """After three of its four steps, thus in its second stage."""
    found = integration.ShiftAddGNT(train_dataset=dataset, config_overrides=SMALL)
    for step in range(3):
        losses = found.train_iteration(step)
        assert all(isinstance(value, float) for value in losses.values())
        assert losses["loss"] > 0 and losses["num_rays"] == 64
    assert found.get_info()["loaded_step"] is None and found.get_info()["num_iterations"] == 4
    return found


@pytest.fixture(scope="module")
def checkpoint(method: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("method") / "checkpoint"
    method.save(str(folder))
    return folder


def test_a_checkpoint_renders_the_same_without_the_training_set_and_is_saved_byte_for_byte(
    method: Any, checkpoint: Path, dataset: dict[str, Any], integration: ModuleType, tmp_path: Path
):
    camera = dataset["cameras"][2:3]
    expected = method.render(camera)
    assert {name: value.shape for name, value in expected.items()} == {
        **{"color": (48, 64, 3), "depth": (48, 64), "accumulation": (48, 64)},
    }
    moved = Path(shutil.copytree(checkpoint, tmp_path / "moved"))
    restored = integration.ShiftAddGNT(checkpoint=str(moved))
    shutil.rmtree(moved)
    info = restored.get_info()
    assert info["loaded_step"] == 3 and info["loaded_checkpoint"] == str(moved)
    assert info["hparams"]["pipeline.model.gnt.width"] == 16
    assert json.loads(json.dumps(info["hparams"])) == info["hparams"]
    assert not any(" at 0x" in str(value) for value in info["hparams"].values())
    for name, value in restored.render(camera).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5, rtol=1e-5)
    restored.save(str(tmp_path / "again"))
    assert all_files(tmp_path / "again") == all_files(checkpoint)
    with pytest.raises(UserError, match="opened without a train_dataset"):
        restored.train_iteration(3)
    restored.close()


def test_training_goes_on_from_a_checkpoint_with_the_dataset_it_was_trained_on(
    method: Any, checkpoint: Path, dataset: dict[str, Any], integration: ModuleType, tmp_path: Path
):
    camera = dataset["cameras"][2]
    changes = {"max_num_iterations": 6}
    going_on = integration.ShiftAddGNT(checkpoint=str(checkpoint), train_dataset=dataset, config_overrides=changes)
    assert going_on.get_info()["loaded_step"] == 3 and going_on.get_info()["num_iterations"] == 6
    before = going_on.render(camera)
    for name, value in method.render(camera).items():
        np.testing.assert_allclose(before[name], value, atol=1e-5, rtol=1e-5)
    going_on.train_iteration(3)
    assert np.abs(going_on.render(camera)["color"] - before["color"]).max() > 0
    # Over an older one: what was there is no part of it.
    shutil.copytree(checkpoint, tmp_path / "over")
    (tmp_path / "over/scene/images/00099.png").write_bytes(b"")
    going_on.save(str(tmp_path / "over"))
    saved, old = all_files(tmp_path / "over"), all_files(checkpoint)
    assert saved.keys() == old.keys()
    assert {name for name in saved if saved[name] != old[name]} == {"model.ckpt", "shiftadd_gnt.json"}
    assert integration.ShiftAddGNT(checkpoint=str(tmp_path / "over")).get_info()["loaded_step"] == 4


def test_a_method_is_saved_before_its_first_step(
    make_dataset: Callable[..., dict[str, Any]], integration: ModuleType, tmp_path: Path
):
    dataset = make_dataset()
    method = integration.ShiftAddGNT(train_dataset=dataset, config_overrides=SMALL)
    method.save(str(tmp_path / "first"))
    restored = integration.ShiftAddGNT(checkpoint=str(tmp_path / "first"), train_dataset=dataset)
    assert restored.get_info()["loaded_step"] == 0
    expected = method.render(dataset["cameras"][0])
    np.testing.assert_allclose(restored.render(dataset["cameras"][0])["color"], expected["color"], atol=1e-5)


@pytest.mark.parametrize("changes", [{"average_weights": 0.9}, {"pipeline.datamanager.judged_views": 1}])
def test_the_weights_that_are_kept_are_those_that_are_rendered_with(
    changes: dict[str, Any], make_dataset: Callable[..., dict[str, Any]], integration: ModuleType, tmp_path: Path
):
    dataset = make_dataset()
    overrides = {**SMALL, **changes, "steps_per_judgement": 1, "optimizers.transformers.optimizer.lr": 0.05}
    method = integration.ShiftAddGNT(train_dataset=dataset, config_overrides=overrides)
    for step in range(3):
        method.train_iteration(step)
    expected = method.render(dataset["cameras"][1])["color"]
    method.save(str(tmp_path / "kept"))
    found = integration.ShiftAddGNT(checkpoint=str(tmp_path / "kept")).render(dataset["cameras"][1])["color"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_view_is_rendered_from_the_camera_that_it_was_trained_with(
    make_dataset: Callable[..., dict[str, Any]], integration: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    dataset = make_dataset(
        camera_models=np.int32([0, 1, 2, 0, 0, 0]),
        distortion_parameters=np.tile(np.float32([0.1, 0.02, 0.003, 0.004, 0.005, 0.006]), (6, 1)),
    )
    method = integration.ShiftAddGNT(train_dataset=dataset, config_overrides=SMALL)
    model, render = method._pipeline.model, method._pipeline.model.get_outputs_for_camera
    seen: list[Any] = []
    monkeypatch.setattr(model, "get_outputs_for_camera", lambda camera: seen.append(camera) or render(camera))
    for index in range(3):
        found = method.render(dataset["cameras"][index])
        # In the dataset's units; a ray is longer than its z depth, here by a third at most.
        assert found["depth"].min() >= 2.0 * 0.999 and found["depth"].max() <= 8.0 * 1.34
        trained = method._pipeline.datamanager.train_dataset.cameras[index : index + 1]
        for name in ("camera_to_worlds", "fx", "fy", "cx", "cy", "width", "height", "distortion_params", "camera_type"):
            own, expected = getattr(seen[-1], name), getattr(trained, name)
            assert own.shape == expected.shape and own.dtype == expected.dtype
            np.testing.assert_allclose(own, expected, atol=1e-6)


class Bomb:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def break_checkpoint(folder: Path, how: str) -> None:
    description, weights = folder / "shiftadd_gnt.json", folder / "model.ckpt"
    if how == "gone":
        shutil.rmtree(folder)
    elif how == "unfinished":
        description.unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "no picture":
        (folder / "scene/images/00003.png").unlink()
    elif how == "damaged text":
        description.write_text("{")
    elif how == "another format":
        description.write_text(json.dumps({**json.loads(description.read_text()), "format": "something else"}))
    elif how == "no colour":
        description.write_text(json.dumps({**json.loads(description.read_text()), "background": "white"}))
    elif how == "another width":
        facts = json.loads(description.read_text())
        facts["config_overrides"]["pipeline.model.gnt.width"] = 32
        description.write_text(json.dumps(facts))
    elif how == "cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "another thing":
        torch.save({"weights": torch.zeros(3)}, weights)
    elif how == "code":
        weights.write_bytes(pickle.dumps({"step": 1, "pipeline": Bomb(folder / "executed")}, protocol=2))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("gone", "no such folder; expected a folder that this method saved"),
        ("unfinished", "shiftadd_gnt.json missing; expected a folder that this method saved"),
        ("no weights", "model.ckpt missing; expected a folder"),
        ("no picture", "1 of 6 images not found"),
        ("damaged text", "shiftadd_gnt.json is not valid JSON"),
        ("another format", "shiftadd_gnt.json: of another method or version"),
        ("no colour", "shiftadd_gnt.json: damaged"),
        ("another width", "the checkpoint (recipe add+shift-attn+moe, stage 2) is of another network"),
        ("cut short", "model.ckpt: damaged, or not a checkpoint that can be read safely"),
        ("another thing", "model.ckpt: not a nerfstudio checkpoint"),
        ("code", "model.ckpt: damaged, or not a checkpoint that can be read safely"),
    ],
)
def test_a_broken_checkpoint_is_refused_in_one_line(
    how: str, message: str, checkpoint: Path, integration: ModuleType, tmp_path: Path
):
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    break_checkpoint(broken, how)
    with pytest.raises(UserError) as error:
        integration.ShiftAddGNT(checkpoint=str(broken))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (broken / "executed").exists()


def test_another_dataset_and_a_folder_that_cannot_be_written_are_refused_in_one_line(
    method: Any, checkpoint: Path, make_dataset: Callable[..., dict[str, Any]], integration: ModuleType, tmp_path: Path
):
    with pytest.raises(UserError, match=r"was trained on another dataset \(6 views; this one has 5\); expected"):
        integration.ShiftAddGNT(checkpoint=str(checkpoint), train_dataset=make_dataset(count=5))
    with pytest.raises(UserError, match="expected a checkpoint, a train_dataset, or both"):
        integration.ShiftAddGNT()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the checkpoint cannot be written"):
        method.save(str(tmp_path / "file"))


# NerfBaselines itself


@pytest.mark.slow
def test_nerfbaselines_finds_trains_saves_and_loads_the_method(
    folder: Path, tiny_scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    nerfbaselines = pytest.importorskip("nerfbaselines")
    from nerfbaselines import _registry, datasets
    from nerfbaselines.io import get_checkpoint_sha

    monkeypatch.setenv("NERFBASELINES_REGISTER", str(folder / "shiftadd_gnt_spec.py"))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(_registry, "_auto_register_completed", False)
    for name in ("methods", "datasets", "dataset_loaders", "evaluation_protocols", "loggers"):
        monkeypatch.setattr(_registry, f"{name}_registry", {})
    spec = nerfbaselines.get_method_spec("shiftadd-gnt")
    with nerfbaselines.build_method_class(spec, backend="python") as method_class:
        info = method_class.get_method_info()
        assert info["method_id"] == "shiftadd-gnt"
        views = {
            split: datasets.load_dataset(tiny_scene, split, info["required_features"], info["supported_camera_models"])
            for split in ("train", "test")
        }
        method = method_class(train_dataset=views["train"], config_overrides=SMALL)
        for step in range(4):
            method.train_iteration(step)
        expected = method.render(views["test"]["cameras"][0])
        method.save(str(tmp_path / "first"))
        restored = method_class(checkpoint=str(tmp_path / "first"))
        assert restored.get_info()["loaded_step"] == 4
        for name, value in restored.render(views["test"]["cameras"][0]).items():
            np.testing.assert_allclose(value, expected[name], atol=1e-5, rtol=1e-5)
        restored.save(str(tmp_path / "second"))
        assert get_checkpoint_sha(str(tmp_path / "first")) == get_checkpoint_sha(str(tmp_path / "second"))
