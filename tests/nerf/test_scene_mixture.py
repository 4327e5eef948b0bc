"""Training across scenes: what is listed, what is drawn, and what a step sees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shiftadd3d import UserError
from shiftadd3d.nerf.datamanager import GNTDataManager, GNTDataManagerConfig
from shiftadd3d.nerf.model import depth_cross_entropy
from shiftadd3d.nerf.scene_mixture import ListedScene, Photometric, SceneMixture, TrainScene, list_scenes

SIZE = (48, 32)


def names(scenes: list[ListedScene]) -> list[tuple[str, float]]:
    return [(scene.path.name, scene.weight) for scene in scenes]


def test_scenes_folders_of_scenes_and_lists_mix(tmp_path, write_scene):
    write_scene["nerfstudio"](tmp_path / "factory/b")
    write_scene["llff"](tmp_path / "factory/a")
    (tmp_path / "factory/notes").mkdir()
    write_scene["nerfstudio"](tmp_path / "factory/.unfinished")
    write_scene["colmap"](tmp_path / "alone")
    write_scene["blender"](tmp_path / "with blanks")
    (tmp_path / "list.txt").write_text("# twice as often\nalone 2\n\nwith blanks\nfactory 0.5  # both\n")
    assert names(list_scenes([tmp_path / "factory"])) == [("a", 1.0), ("b", 1.0)]
    assert names(list_scenes([tmp_path / "list.txt", tmp_path / "alone"])) == [
        ("alone", 2.0),
        ("with blanks", 1.0),
        ("a", 0.5),
        ("b", 0.5),
        ("alone", 1.0),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "lists no scene"),
        ("scene 0", "line 1: weight 0; expected a positive number"),
        ("scene inf", "line 1: weight inf; expected a positive number"),
        ("elsewhere", "neither a scene nor a folder of scenes"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused(tmp_path, content, message, write_scene):
    write_scene["nerfstudio"](tmp_path / "scene")
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        list_scenes([tmp_path / "list.txt"])


def test_a_list_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"list\.txt cannot be read"):
        list_scenes([tmp_path / "list.txt"])


class Loader:
    """Scenes of `size` bytes; those whose name begins with `broken` cannot be read."""

    def __init__(self, size: int = 100) -> None:
        self.loaded: list[str] = []
        self.size = size

    def __call__(self, path: Path) -> TrainScene:
        if path.name.startswith("broken"):
            raise UserError(f"{path} is broken")
        self.loaded.append(path.name)
        scene = object.__new__(Sized)
        scene.name, scene.bytes = path.name, self.size
        return scene


class Sized(TrainScene):
    name: str
    bytes: int

    @property
    def num_bytes(self) -> int:
        return self.bytes


def test_scenes_are_drawn_by_weight():
    scenes = [ListedScene(Path("often"), 3.0), ListedScene(Path("seldom"), 1.0)]
    mixture = SceneMixture(scenes, Loader(), max_bytes=1000)
    drawn = [mixture.draw().name for _ in range(400)]
    assert 0.68 < drawn.count("often") / len(drawn) < 0.82


def test_a_scene_is_read_once_while_there_is_room():
    loader = Loader()
    mixture = SceneMixture([ListedScene(Path(str(i))) for i in range(5)], loader, max_bytes=500)
    for _ in range(50):
        mixture.draw()
    assert sorted(loader.loaded) == sorted(set(loader.loaded))


def test_memory_is_bounded_by_dropping_what_was_drawn_longest_ago():
    loader = Loader(size=300)
    mixture = SceneMixture([ListedScene(Path(str(i))) for i in range(5)], loader, max_bytes=700)
    for _ in range(50):
        mixture.draw()
        assert sum(scene.num_bytes for scene in mixture._kept.values()) <= 700
    assert len(loader.loaded) > 5


def test_a_scene_that_cannot_be_read_is_left_out_and_named(capsys):
    scenes = [ListedScene(Path("broken one")), ListedScene(Path("good"))]
    mixture = SceneMixture(scenes, Loader(), max_bytes=1000)
    assert {mixture.draw().name for _ in range(20)} == {"good"}
    assert list(mixture.skipped) == [Path("broken one")]
    told = capsys.readouterr().out
    assert told.count("left out") == 1 and "broken one is broken" in told


def test_no_scene_that_can_be_read_is_an_error():
    mixture = SceneMixture([ListedScene(Path("broken"))], Loader(), max_bytes=1000)
    with pytest.raises(UserError, match="none of the 1 training scenes can be read"):
        mixture.draw()


def test_the_same_change_of_colours_reaches_all_pictures_and_keeps_them_pictures():
    colors = torch.rand(5, 7, 3)
    change = Photometric.draw()
    changed = change(colors)
    assert changed.shape == colors.shape and float(changed.min()) >= 0.0 and float(changed.max()) <= 1.0
    torch.testing.assert_close(change(colors[2, 3]), changed[2, 3])
    assert not torch.equal(changed, colors)


# --------------------------------------------------------------------------------------------------------------------
# A step
# --------------------------------------------------------------------------------------------------------------------


def manager(folder: Path, *scenes: Path, **settings) -> GNTDataManager:
    settings = {"train_num_rays_per_batch": 40, "eval_num_rays_per_batch": 8, "num_source_views": 3} | settings
    config = GNTDataManagerConfig(data=folder, near=2.0, far=6.0, train_scenes=scenes, **settings)
    return config.setup(device="cpu", test_mode="val")


def test_a_step_sees_one_scene_with_some_of_its_views(tmp_path, write_scene):
    held_out = write_scene["nerfstudio"](tmp_path / "held-out", count=10, size=SIZE)
    a = write_scene["nerfstudio"](tmp_path / "a", count=9, size=SIZE, shiftadd3d={"near": 1.0, "far": 9.0})
    b = write_scene["colmap"](tmp_path / "b", count=7, size=SIZE)
    data = manager(held_out, a, b, train_source_views=(2, 4))
    seen = set()
    for _ in range(12):
        rays, batch = data.next_train(0)
        drawn = data.drawn
        assert drawn is not None
        count = len(drawn.views.images)
        seen.add(count)
        assert rays.origins.shape == (40, 3) and batch["image"].shape == (40, 3)
        assert rays.metadata["source_ids"].shape == (40, count)
        assert 0 < drawn.near < drawn.far
        # The target is none of its own sources.
        centres = drawn.views.camera_to_world[:, :3, 3]
        assert float((centres - rays.origins[0]).norm(dim=-1).min()) > 0.1
    assert seen == {2, 3, 4}


def test_pictures_are_shrunk_to_the_longest_side_asked_for(tmp_path, write_scene):
    held_out = write_scene["nerfstudio"](tmp_path / "held-out", size=SIZE)
    scene = write_scene["nerfstudio"](tmp_path / "a", size=SIZE)
    data = manager(held_out, scene, train_scene_max_side=24)
    data.next_train(0)
    assert data.drawn is not None and data.drawn.views.images.shape[1:3] == (16, 24)


def test_true_depths_come_with_the_rays_in_the_units_of_the_poses(tmp_path, write_scene):
    held_out = write_scene["nerfstudio"](tmp_path / "held-out", size=SIZE)
    scene = write_scene["nerfstudio"](tmp_path / "a", size=SIZE, depth_unit_scale_factor=0.001)
    meta = json.loads((scene / "transforms.json").read_text())
    (scene / "depths").mkdir()
    for index, frame in enumerate(meta["frames"]):
        frame["depth_file_path"] = f"depths/{index}.png"
        Image.fromarray(np.full(SIZE[::-1], 3000, dtype=np.uint16)).save(scene / frame["depth_file_path"])
    (scene / "transforms.json").write_text(json.dumps(meta))
    data = manager(held_out, scene)
    _, batch = data.next_train(0)
    # The parser scales the scene so that its cameras fit into a box: depths follow.
    centres = data.train_mixture._get(scene).bank.camera_to_world[:, :3, 3]
    scale = float((centres[0] - centres[1]).norm()) / np.linalg.norm(
        np.array(meta["frames"][0]["transform_matrix"])[:3, 3] - np.array(meta["frames"][1]["transform_matrix"])[:3, 3]
    )
    torch.testing.assert_close(batch["depth"], torch.full((40,), 3.0 * scale), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_source_views": (1, 4)}, r"train-source-views 1 4: expected 2 <= fewest <= most"),
        ({"train_source_views": (5, 4)}, r"train-source-views 5 4: expected 2 <= fewest <= most"),
        ({"train_scenes_memory": 0.0}, r"train-scenes-memory 0: expected a positive number of GB"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, settings, message, write_scene):
    scene = write_scene["nerfstudio"](tmp_path / "a", size=SIZE)
    held_out = write_scene["nerfstudio"](tmp_path / "held-out", size=SIZE)
    with pytest.raises(UserError, match=message):
        manager(held_out, scene, **settings)


@pytest.mark.parametrize("named", ["scenes", "scenes/held-out", "list.txt", "link"])
def test_a_held_out_scene_among_those_trained_on_is_refused(tmp_path, write_scene, named):
    held_out = write_scene["nerfstudio"](tmp_path / "scenes/held-out", size=SIZE)
    write_scene["nerfstudio"](tmp_path / "scenes/a", size=SIZE)
    (tmp_path / "list.txt").write_text("scenes/a\nscenes/held-out\n")
    (tmp_path / "link").symlink_to(held_out)
    with pytest.raises(UserError, match="is held out for evaluation and among the training scenes"):
        manager(held_out, tmp_path / named)


def test_the_scene_of_a_step_depends_on_seed_and_step_alone(tmp_path, write_scene):
    held_out = write_scene["nerfstudio"](tmp_path / "held-out", size=SIZE)
    scenes = [write_scene["nerfstudio"](tmp_path / name, count=5 + i, size=SIZE) for i, name in enumerate("abc")]

    def drawn(seed: int, steps: range) -> list[int]:
        torch.manual_seed(seed)
        data = manager(held_out, *scenes)
        found = []
        for step in steps:
            data.next_train(step)
            found.append(len(next(reversed(data.train_mixture._kept.values())).bank))  # views tell them apart
        return found

    whole = drawn(0, range(24))
    assert set(whole) == {5, 6, 7}
    assert drawn(0, range(9, 24)) == whole[9:]
    assert drawn(1, range(24)) != whole
    assert drawn(1, range(23)) != whole[1:], "another process draws the same, a step later"


def test_a_scene_of_too_few_views_is_left_out(tmp_path, capsys, write_scene):
    held_out = write_scene["nerfstudio"](tmp_path / "held-out", size=SIZE)
    data = manager(held_out, write_scene["nerfstudio"](tmp_path / "few", count=3, size=SIZE))
    with pytest.raises(UserError, match="none of the 1 training scenes"):
        data.next_train(0)
    assert "few has 3 views; expected at least 4" in "".join(capsys.readouterr().out.split("\n"))


def test_the_depth_loss_is_least_for_weights_on_the_true_surface():
    depths = (1.0 / torch.linspace(1.0, 0.2, 9)).expand(2, -1)
    truth = torch.tensor([float(depths[0, 4]), 0.0])  # the second ray's depth is unknown
    losses = [float(depth_cross_entropy(torch.eye(9)[plane].expand(2, -1), depths, truth)) for plane in range(9)]
    assert int(np.argmin(losses)) == 4
    assert losses[3] < losses[1]


def test_rays_without_a_known_depth_give_no_depth_loss():
    depths = torch.linspace(1.0, 5.0, 9).expand(3, -1)
    weights = torch.full((3, 9), 1 / 9, requires_grad=True)
    loss = depth_cross_entropy(weights, depths, torch.tensor([0.0, 0.5, 7.0]))
    loss.backward()
    assert loss.detach() == 0 and weights.grad is not None and not bool(weights.grad.any())
