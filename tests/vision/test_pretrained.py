"""Pretrained weights: from a file, from the cache, and what happens where there are none."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants
from rich.console import Console
from torch import nn

from shiftadd3d import UserError, cli
from shiftadd3d.configs.classification import PRESETS
from shiftadd3d.vision import finetune as finetune_module
from shiftadd3d.vision import pretrained
from shiftadd3d.vision.checkpoint import ClassifierConfig, create_dense, save_classifier
from shiftadd3d.vision.finetune import finetune
from shiftadd3d.vision.settings import FinetuneSettings, StageSettings, read_settings

NAME = "deit_tiny_patch16_224"
LARGER = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32}


@pytest.fixture(scope="module")
def published() -> nn.Module:
    """A network of 1,000 classes at 32 px, of the size of the fixture `model`."""
    torch.manual_seed(7)
    return timm.create_model(NAME, num_classes=1000, **LARGER)


def check_loaded(model: nn.Module, published: nn.Module) -> None:
    """All is as it was published, but the head, and the positions, of which there are fewer."""
    new, old = model.state_dict(), published.state_dict()
    changed = {name for name in old if new[name].shape != old[name].shape or not torch.equal(new[name], old[name])}
    assert changed == {"head.weight", "head.bias", "pos_embed"}
    assert new["head.weight"].shape == (3, 16) and new["pos_embed"].shape == (1, 5, 16)
    assert torch.equal(new["pos_embed"][:, 0], old["pos_embed"][:, 0])  # that of the class token
    torch.testing.assert_close(new["pos_embed"][:, 1:].mean(1), old["pos_embed"][:, 1:].mean(1), atol=0.01, rtol=0)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_weights_is_what_a_training_starts_from(
    suffix: str, published: nn.Module, config: ClassifierConfig, tmp_path: Path
):
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": published.state_dict()}, file)  # as DeiT's authors do
    else:
        safetensors.torch.save_file(published.state_dict(), file)
    model = create_dense(config, file)
    check_loaded(model, published)
    assert "state_dict" not in model.pretrained_cfg and model.pretrained_cfg["num_classes"] == 3
    save_classifier(tmp_path / "saved", model.state_dict(), config)


def test_a_run_says_where_its_weights_come_from_and_keeps_all_but_the_head(
    published: nn.Module, settings: FinetuneSettings, tmp_path: Path
):
    safetensors.torch.save_file(published.state_dict(), tmp_path / "weights.safetensors")
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    frozen = StageSettings(epochs=1, lr=1e-2, freeze_backbone=True)
    settings = replace(settings, weights=tmp_path / "weights.safetensors", recipe="mult", stage0=frozen)
    result = finetune(settings, console=console)
    check_loaded(result.model, published)
    printed = console.export_text()
    assert f"pretrained weights from {tmp_path / 'weights.safetensors'}" in printed
    assert f"{NAME} at 16 px, steps of 12 pictures: 3 in stage0-dense (head alone)" in printed
    assert "stage0-dense: 3 steps" in printed
    (tmp_path / "weights.safetensors").unlink()  # a run that has begun holds all of its weights
    two = replace(read_settings(result.folder), stage0=replace(frozen, epochs=2))
    check_loaded(finetune(two, resume=True).model, published)


def test_files_of_weights_that_are_none_or_of_others_are_refused_in_one_line(
    published: nn.Module, config: ClassifierConfig, settings: FinetuneSettings, tmp_path: Path
):
    def complaint(**changes) -> str:
        with pytest.raises(UserError) as caught:
            finetune(replace(settings, weights=tmp_path / "w.safetensors", **changes))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such file; expected weights" in complaint()
    (tmp_path / "w.safetensors").write_bytes(b"no weights")
    assert "damaged, or no weights that can be read safely" in complaint()
    safetensors.torch.save_file(published.state_dict(), tmp_path / "w.safetensors")
    assert "not of deit_tiny_patch16_224 with embed_dim=48" in complaint(model_args=("embed_dim=48", "depth=2"))
    assert "--weights and --start-from: expected one of the two" in complaint(start_from=tmp_path)


def test_weights_in_the_cache_need_no_server(
    published: nn.Module, config: ClassifierConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    repository = tmp_path / "models--timm--deit_tiny_patch16_224.fb_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    file = repository / "snapshots" / ("0" * 40) / "model.safetensors"
    safetensors.torch.save_file(published.state_dict(), file)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained, "urlopen", None)
    assert pretrained.fetch(NAME) == file
    check_loaded(create_dense(config, True), published)
    file.unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot be had \(they are not in the cache, and HF_HUB_OFFLINE is set\)"):
        create_dense(config, True)


def test_a_server_that_says_nothing_is_waited_for_a_moment_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    downloads = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args: downloads.append(args))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda *args: address)
        with pytest.raises(UserError, match=r"^127\.0\.0\.1 cannot be reached: .*(no answer in 0\.2 s|timed out)"):
            pretrained.fetch(NAME, wait=0.2)
    with pytest.raises(UserError, match=r"127\.0\.0\.1 cannot be reached: .*refused"):  # nobody listens any more
        pretrained.fetch(NAME, wait=5)
    assert downloads == []


def test_looking_up_a_name_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    forever = threading.Event()
    monkeypatch.setattr(pretrained, "urlopen", lambda *args, **options: forever.wait())
    with pytest.raises(UserError, match=r"example\.org cannot be reached: no answer in 0\.1 s"):
        pretrained._check_answer("https://example.org/x", 0.1)
    forever.set()


def test_models_say_where_their_weights_come_from():
    assert pretrained.describe_source(NAME) == f"timm/{NAME}.fb_in1k on the Hugging Face hub (apache-2.0)"
    assert pretrained.describe_source("test_nonsense") == ""
    with pytest.raises(UserError, match="timm has none for test_nonsense"):
        pretrained.fetch("test_nonsense")


def test_without_weights_a_default_training_starts_from_random_ones_and_says_so(
    settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
):
    def unavailable(model: str) -> None:
        raise UserError("the server cannot be reached")

    monkeypatch.setattr(finetune_module, "fetch", unavailable)
    console = Console(width=300, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    settings = replace(settings, recipe="mult")
    result = finetune(replace(settings, pretrained=True, image_size=32), fallback=settings, console=console)
    assert result.model.classifier_config.input.size == 16
    lines = [line for line in console.export_text().splitlines() if "random weights" in line]
    assert len(lines) == 1 and "cannot be had (the server cannot be reached); --weights FILE" in lines[0]
    assert not read_settings(result.folder).pretrained  # so that going on needs none, either
    finetune(replace(settings, stage0=replace(settings.stage0, epochs=2)), resume=True)


def test_pictures_without_a_preset_get_pretrained_weights_and_random_ones_only_as_a_fallback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def verb(*args: str) -> tuple[FinetuneSettings, FinetuneSettings | None]:
        made = cli.Finetune.with_defaults(args)
        return made, made.fallback

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen, fallback = verb("--data", "x", "--seed", "3", "--stage1.epochs", "2")
    assert (chosen.pretrained, chosen.image_size, chosen.stage0.freeze_backbone) == (True, 112, True)
    assert fallback is not None
    small = PRESETS["small"]
    assert (fallback.model_args, fallback.image_size) == (small.model_args, small.image_size)
    assert (fallback.pretrained, fallback.seed, str(fallback.data)) == (False, 3, "x")
    assert fallback.stage1 == replace(small.stage1, epochs=2) and fallback.stage0 == small.stage0
    # Another model keeps its own shape; it is trained whole, as there is nothing to keep.
    _, fallback = verb("--data", "x", "--model", "pvt_v2_b0")
    assert fallback is not None and (fallback.model, fallback.model_args) == ("pvt_v2_b0", ())
    assert not fallback.pretrained and not fallback.stage0.freeze_backbone
    # Who asks for something gets that, or an error.
    for options in (["--pretrained"], ["--weights", "w.pth"], ["--preset", "laptop"], ["--preset=deit-tiny"]):
        chosen, fallback = verb("--data", "x", *options)
        assert chosen.pretrained and fallback is None
    for options in (["--no-pretrained"], ["--start-from", "y"], ["--model-args", "depth=3"], ["--preset", "small"]):
        chosen, fallback = verb("--data", "x", *options)
        assert not chosen.pretrained and fallback is None and chosen.image_size == 64
    chosen, fallback = verb()
    assert chosen.image_size == 16 and not chosen.pretrained and fallback is None  # the digits
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert verb("--data", str(tmp_path))[0].image_size == 224
    assert verb("--data", "x")[0].image_size == 112  # which is not there, so nobody looks for a GPU
    assert verb("--data", str(tmp_path), "--device", "cpu")[0].image_size == 112
