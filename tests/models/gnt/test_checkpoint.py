"""Files of the released GNT code, good and bad."""

import os
import pickle
import zipfile

import pytest
import torch

from shiftadd3d import UserError
from shiftadd3d.models.gnt import GNTModel, load_official_checkpoint


def official(model: GNTModel) -> dict:
    """What the released code would save for `model`."""
    parts = ("net_coarse", "feature_net", "net_fine")
    return {part: getattr(model, part).state_dict() for part in parts if getattr(model, part) is not None}


def refusal(path) -> str:
    """The one-line message that a bad file is refused with; it names the file."""
    with pytest.raises(UserError) as caught:
        load_official_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"depth": 3, "width": 24},
        {"feature_dim": 12, "feature_widths": (8, 16, 20), "feature_blocks": (2, 1, 3)},
        {"single_net": False},
    ],
    ids=["small", "deep and wide", "other features", "two networks"],
)
def test_sizes_and_weights_come_from_the_tensors(config, tmp_path, sizes):
    model = GNTModel(config(**sizes))
    path = tmp_path / "model.pth"
    torch.save(official(model), path)
    loaded = load_official_checkpoint(str(path))
    assert not loaded.training
    own, other = model.config, loaded.config
    for name in ("depth", "width", "feature_dim", "feature_widths", "feature_blocks", "single_net"):
        assert getattr(own, name) == getattr(other, name), name
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_the_state_of_the_optimizer_is_ignored(config, tmp_path):
    model = GNTModel(config())
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}
    adam = {"state": {0: moments}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0]}]}
    state = {**official(model), "optimizer": adam, "scheduler": {"last_epoch": 7}}
    torch.save(state, tmp_path / "model.pth")
    loaded = load_official_checkpoint(tmp_path / "model.pth")
    assert torch.equal(loaded.net_coarse.rgb_fc.weight, model.net_coarse.rgb_fc.weight)


def test_the_prefix_that_data_parallel_training_leaves_is_taken_off(config, tmp_path):
    model = GNTModel(config())
    state = {part: {f"module.{name}": x for name, x in state.items()} for part, state in official(model).items()}
    torch.save(state, tmp_path / "model.pth")
    loaded = load_official_checkpoint(tmp_path / "model.pth")
    assert torch.equal(loaded.net_coarse.rgb_fc.weight, model.net_coarse.rgb_fc.weight)


def test_a_checkpoint_without_a_fine_network_may_say_so_by_none(config, tmp_path):
    torch.save({**official(GNTModel(config())), "net_fine": None}, tmp_path / "model.pth")
    assert load_official_checkpoint(tmp_path / "model.pth").net_fine is None


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    assert "no such" in refusal(tmp_path / "model.pth")
    assert "no such" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a checkpoint at all\n", b"PK\x03\x04" + bytes(64)])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    refusal(path)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(config, tmp_path, fraction):
    path = tmp_path / "model.pth"
    torch.save(official(GNTModel(config())), path)
    os.truncate(path, int(path.stat().st_size * fraction))
    refusal(path)


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    "write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2))], ids=["torch", "raw"]
)
def test_code_in_a_pickle_is_refused_and_not_run(config, tmp_path, write):
    exploded = tmp_path / "exploded"
    path = tmp_path / "model.pth"
    write({**official(GNTModel(config())), "optimizer": Bomb(exploded)}, path)
    assert "safely" in refusal(path)
    assert not exploded.exists()


def test_an_archive_of_something_else_is_refused(tmp_path):
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refusal(path)


@pytest.mark.parametrize(
    "state",
    [
        torch.nn.Linear(2, 2).state_dict(),
        {"net_coarse": torch.nn.Linear(2, 2).state_dict(), "feature_net": {}},
        {"net_coarse": {}, "feature_net": {}},
        {"net_coarse": {0: torch.zeros(1)}, "feature_net": {}},
        {"net_coarse": [1, 2], "feature_net": {}},
        [torch.zeros(2)],
        torch.zeros(2),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "model.pth")
    refusal(tmp_path / "model.pth")


def test_a_missing_tensor_is_named(config, tmp_path):
    state = official(GNTModel(config()))
    del state["net_coarse"]["view_crosstrans.1.attn.q_fc.weight"]
    torch.save(state, tmp_path / "model.pth")
    assert "view_crosstrans.1.attn.q_fc.weight" in refusal(tmp_path / "model.pth")


def test_a_tensor_of_another_shape_is_named(config, tmp_path):
    state = official(GNTModel(config()))
    state["feature_net"]["conv1.weight"] = torch.zeros(3, 3, 7, 7)
    torch.save(state, tmp_path / "model.pth")
    assert "conv1.weight" in refusal(tmp_path / "model.pth")


def test_two_networks_need_features_for_both(config, tmp_path):
    state = official(GNTModel(config(single_net=False)))
    del state["net_fine"]
    torch.save(state, tmp_path / "model.pth")
    assert "iconv2" in refusal(tmp_path / "model.pth")
