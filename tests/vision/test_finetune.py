"""The stages from pictures to a ShiftAdd classifier, and the checkpoints between them."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from shiftadd3d import UserError, cli
from shiftadd3d.configs.classification import PRESETS
from shiftadd3d.nn import MoEMlp, PackedShiftLinear, Recipe, Rule, ShiftLinear, recipe
from shiftadd3d.vision import engine
from shiftadd3d.vision import finetune as finetune_module
from shiftadd3d.vision.checkpoint import ClassifierConfig, create_classifier, create_dense, load, save_classifier
from shiftadd3d.vision.data import InputConfig
from shiftadd3d.vision.finetune import finetune, run_folder
from shiftadd3d.vision.settings import FinetuneSettings, StageSettings, parse_key_values, read_settings

MEASURED = ("latencies=(2.0,1.0)",)  # timing the experts takes a while


def test_stages_of_each_recipe():
    def kinds(chosen: Recipe) -> list[str | None]:
        return [
            None if stage is None else f"{stage.attention}/{stage.attention_linear}/{stage.mlp}"
            for stage in chosen.stages()
        ]

    assert kinds(recipe("mult")) == [None, None]
    assert kinds(recipe("add")) == ["add/mult/mult", None]
    assert kinds(recipe("add+shift-attn+moe")) == ["add/mult/mult", "add/shift/moe"]
    assert kinds(Recipe(mlp="shift")) == [None, "keep/mult/shift"]
    only_here = Recipe(rules=(Rule("blocks.0.*", "add"), Rule("blocks.1.*", "shift")))
    first, second = only_here.stages()
    assert first is not None and [rule.primitive for rule in first.rules] == ["add"]
    assert second is only_here


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """The folder of a finished run of all three stages."""
    settings = FinetuneSettings(
        data=folder,
        model_args=("patch_size=8", "embed_dim=16", "depth=2", "num_heads=2"),
        image_size=16,
        batch_size=12,
        recipe_args=MEASURED,
        stage0=StageSettings(epochs=2, lr=3e-3),
        stage1=StageSettings(epochs=1, lr=1e-3),
        stage2=StageSettings(epochs=1, lr=1e-3),
        output_dir=tmp_path_factory.mktemp("outputs"),
        name="run",
    )
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    result = finetune(settings, console=console)
    (result.folder / "printed.txt").write_text(console.export_text())
    return result.folder


def test_a_run_leaves_its_stages_pictures_and_a_summary(run: Path):
    summary = json.loads((run / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["stage0-dense", "stage1-add", "stage2-shift"]
    assert summary["pictures"] == {"train": 36, "val": 12, "skipped": 0}
    for stage in ("stage0-dense", "stage1-add", "stage2-shift"):
        for name in ("curves.png", "confusion.png", "history.json", "state.pt", "best/config.json"):
            assert (run / stage / name).is_file()
    printed = (run / "printed.txt").read_text()
    assert "colors: 3 classes, 36 training and 12 validation pictures" in printed
    assert "stage2-shift" in printed and "shiftadd3d evaluate" in printed


def test_each_stage_is_what_its_name_says(run: Path):
    dense, additive, shifted = (load(run / stage / "best") for stage in ("stage0-dense", "stage1-add", "stage2-shift"))
    kinds = [{type(module).__name__ for module in model.modules()} for model in (dense, additive, shifted)]
    assert "AddAttention" not in " ".join(kinds[0])
    assert any("Add" in kind for kind in kinds[1]) and "ShiftLinear" not in kinds[1]
    assert {"ShiftLinear", "MoEMlp"} <= kinds[2]
    assert shifted.classifier_config.recipe.name == "add+shift-attn+moe"
    assert shifted.pretrained_cfg["label_names"] == ["blue", "green", "red"]
    assert not any(isinstance(module, PackedShiftLinear) for module in shifted.modules())


def test_stages_start_from_the_best_weights_of_the_one_before(run: Path):
    dense, additive = load(run / "stage0-dense" / "best"), load(run / "stage1-add" / "best")
    # Three steps move weights by a few thousandths; two draws of them are far apart.
    assert (additive.pos_embed - dense.pos_embed).abs().max() < 0.02
    assert (create_dense(dense.classifier_config).pos_embed - dense.pos_embed).abs().max() > 0.02


def test_a_finished_run_can_be_gone_on_with_and_trains_nothing_again(run: Path, monkeypatch: pytest.MonkeyPatch):
    def never(self, *args):
        raise AssertionError("a step of training")

    monkeypatch.setattr(engine._Training, "_step", never)
    before = json.loads((run / "summary.json").read_text())
    finetune(read_settings(run), resume=True)
    assert json.loads((run / "summary.json").read_text()) == before


def test_a_folder_that_holds_a_run_is_not_overwritten(run: Path):
    settings = read_settings(run)
    with pytest.raises(UserError, match=r"holds an earlier run: go on with `shiftadd3d finetune --resume .*`, or"):
        finetune(settings)
    with pytest.raises(UserError, match="was begun with other --image-size, --recipe; choose another --name"):
        finetune(replace(settings, image_size=32, recipe="moe"), resume=True)
    with pytest.raises(UserError, match=r"no settings\.json in there; expected the folder of an earlier run"):
        finetune(replace(settings, name="elsewhere"), resume=True)


def copied(run: Path, folder: Path) -> FinetuneSettings:
    """The settings of a copy of `run` in `folder`."""
    shutil.copytree(run, folder / "copy")
    return replace(read_settings(run), output_dir=folder, name="copy")


def test_what_cannot_go_on_leaves_the_run_as_it_was(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def never(self, *args):
        raise AssertionError("a step of training")

    settings = copied(run, tmp_path)
    three = StageSettings(epochs=3)
    with monkeypatch.context() as patched:
        patched.setattr(engine._Training, "_step", never)
        with pytest.raises(UserError, match=r"stage2-shift/state\.pt: this stage was begun with --opt adamw, not sgd"):
            finetune(replace(settings, opt="sgd", stage2=three), resume=True)
        with pytest.raises(UserError, match=r"begun with freeze-backbone False, not True"):
            finetune(replace(settings, stage2=replace(three, freeze_backbone=True)), resume=True)
        with pytest.raises(
            UserError, match=r"^--stage0\.epochs: .*stage0-dense would be trained further, but later"
        ) as e:
            finetune(replace(settings, stage0=three), resume=True)
        later = [tmp_path / "copy" / name for name in ("stage1-add", "stage2-shift")]
        assert f"{later[0]} and {later[1]} moved away" in str(e.value)
    assert (tmp_path / "copy" / "settings.json").read_bytes() == (run / "settings.json").read_bytes()
    for folder in later:
        shutil.rmtree(folder)
    none = StageSettings(epochs=0)
    finetune(replace(settings, stage0=three, stage1=none, stage2=none), resume=True)
    assert read_settings(tmp_path / "copy").stage0 == three


def test_going_on_needs_no_weights_to_start_from(run: Path, tmp_path: Path, settings: FinetuneSettings):
    none, two = StageSettings(epochs=0), StageSettings(epochs=2, lr=1e-3)
    # No pretrained weights of this size are to be had.
    finetune(replace(copied(run, tmp_path), pretrained=True, stage1=none, stage2=none), resume=True)
    shutil.copytree(run / "stage0-dense" / "best", tmp_path / "dense")
    settings = replace(settings, start_from=tmp_path / "dense", recipe="add", stage2=none)
    finetune(settings)
    shutil.rmtree(tmp_path / "dense")
    resumed = finetune(replace(settings, stage1=two), resume=True)
    assert [stage.name for stage in resumed.stages] == ["stage1-add"]
    assert (resumed.model.pos_embed - load(run / "stage0-dense" / "best").pos_embed).abs().max() < 0.02
    with pytest.raises(UserError, match=r"--start-from .*dense: no such file or folder"):
        finetune(replace(settings, distill_weight=0.5), resume=True)


def test_a_start_that_fails_leaves_its_name_free(settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch):
    settings = replace(settings, recipe="mult")
    with pytest.raises(UserError, match="--batch-size 64: there are only 36 training pictures"):
        finetune(replace(settings, batch_size=64))

    def fail(self, *args):
        raise UserError("in the first epoch")

    with monkeypatch.context() as patched:
        patched.setattr(engine._Training, "_step", fail)
        with pytest.raises(UserError, match="in the first epoch"):
            finetune(settings)
    finetune(settings)
    with pytest.raises(UserError, match="holds an earlier run"):
        finetune(settings)


def test_a_run_interrupted_in_stage_1_goes_on_there(
    settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    settings = replace(settings, recipe="add", stage2=StageSettings(epochs=0))
    through = finetune(replace(settings, name="through"))
    steps: list[int] = []
    step = engine._Training._step

    def interrupt(self, *args):
        steps.append(0)
        self.interrupted = len(steps) == 4
        return step(self, *args)

    monkeypatch.setattr(engine._Training, "_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        finetune(settings)
    assert (run_folder(settings) / "stage1-add" / "state.pt").is_file()
    resumed = finetune(settings, resume=True)
    assert len(steps) == 6  # three for each stage, none twice
    for name, tensor in through.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name])


def test_starting_from_a_dense_or_an_additive_classifier_saves_stages(run: Path, settings: FinetuneSettings):
    settings = replace(settings, recipe_args=MEASURED)
    from_dense = finetune(replace(settings, start_from=run / "stage0-dense" / "best", name="a"))
    assert [stage.name for stage in from_dense.stages] == ["stage1-add", "stage2-shift"]
    from_additive = finetune(replace(settings, start_from=run / "stage1-add" / "best", name="b"))
    assert [stage.name for stage in from_additive.stages] == ["stage2-shift"]
    assert any(isinstance(module, MoEMlp) for module in from_additive.model.modules())
    with pytest.raises(UserError, match=r"made by recipe add\+shift-attn\+moe; expected a dense classifier"):
        finetune(replace(settings, start_from=run / "stage2-shift" / "best", name="c"))
    with pytest.raises(UserError, match="--distill-weight needs the dense teacher"):
        finetune(replace(settings, start_from=run / "stage1-add" / "best", distill_weight=0.5, name="d"))


def test_starting_from_a_classifier_of_other_classes_keeps_all_but_the_head(
    run: Path, settings: FinetuneSettings, tmp_path: Path, folder: Path
):
    shutil.copytree(folder, tmp_path / "two")
    for split in ("train", "val"):
        shutil.rmtree(tmp_path / "two" / split / "red")
    result = finetune(
        replace(
            settings,
            data=tmp_path / "two",
            batch_size=8,
            start_from=run / "stage0-dense" / "best",
            recipe="mult",
            stage0=StageSettings(epochs=1, lr=1e-2, freeze_backbone=True),
        )
    )
    old, new = load(run / "stage0-dense" / "best").state_dict(), result.model.state_dict()
    assert (
        {name for name in new if not torch.equal(new[name], old[name])} == {"head.weight", "head.bias"}
        if all(new[name].shape == old[name].shape for name in new)
        else new["head.weight"].shape == (2, 16)
    )
    assert torch.equal(new["blocks.0.mlp.fc1.weight"], old["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize("stage", ["stage0-dense", "stage1-add"])
def test_starting_from_a_classifier_of_another_size_interpolates_positions(
    stage: str, run: Path, settings: FinetuneSettings
):
    start = run / stage / "best"
    changes: dict = {"recipe": "add", "stage2": StageSettings(epochs=0)} if stage == "stage0-dense" else {}
    settings = replace(settings, recipe_args=MEASURED, image_size=32, start_from=start, **changes)
    larger, smaller = finetune(settings).model, load(start)
    assert larger.classifier_config.input.size == 32 and larger.pos_embed.shape == (1, 17, 16)
    assert (larger.pos_embed[:, 0] - smaller.pos_embed[:, 0]).abs().max() < 0.02
    middle = larger.pos_embed[:, 1:].mean(1) - smaller.pos_embed[:, 1:].mean(1)
    assert middle.abs().max() < 0.02


def test_starting_from_weights_of_timms_training_script(run: Path, settings: FinetuneSettings, tmp_path: Path):
    weights = load(run / "stage0-dense" / "best").state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": t for name, t in weights.items()}}, tmp_path / "w.pth.tar")
    settings = replace(
        settings,
        start_from=tmp_path / "w.pth.tar",
        recipe="add",
        stage0=StageSettings(epochs=0),
        stage2=StageSettings(epochs=0),
    )
    result = finetune(settings)
    assert [stage.name for stage in result.stages] == ["stage1-add"]
    assert (result.model.pos_embed - weights["pos_embed"]).abs().max() < 0.02


def test_a_checkpoint_of_another_architecture_is_refused(run: Path, settings: FinetuneSettings, tmp_path: Path):
    with pytest.raises(UserError, match=r"a deit_tiny_patch16_224 patch_size=8 .* not a pvt_v2_b0; expected the same"):
        finetune(replace(settings, model="pvt_v2_b0", model_args=(), start_from=run / "stage0-dense" / "best"))
    weights = load(run / "stage0-dense" / "best").state_dict()
    with_another_token = {**weights, "pos_embed": torch.zeros(1, 6, 16)}
    torch.save(with_another_token, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"weights of another model .*: pos_embed is \[1, 6, 16\], not \[1, 5, 16\]"):
        finetune(replace(settings, start_from=tmp_path / "w.pth"))
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth: weights of another model than pvt_v2_b0: .* is missing"):
        finetune(replace(settings, model="pvt_v2_b0", model_args=(), image_size=32, start_from=tmp_path / "w.pth"))


def test_hash_functions_are_fitted_once_before_stage_1(settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch):
    fits = []
    fit = finetune_module.fit_binarizers_
    monkeypatch.setattr(
        finetune_module, "fit_binarizers_", lambda *args, **kw: (fits.append(args), fit(*args, **kw))[1]
    )
    settings = replace(settings, recipe_args=("binarizer=hash", *MEASURED))
    result = finetune(settings)
    assert len(fits) == 1
    _, batches = fits[0]
    assert sum(len(batch) for batch in batches) == 36 and batches[0].shape[1:] == (3, 16, 16)
    assert result.model.classifier_config.recipe.binarizer == "hash"
    finetune(settings, resume=True)
    assert len(fits) == 1
    assert torch.equal(load(result.stages[-1].best)(batches[0]), result.model(batches[0]))


def test_distillation_compares_with_the_dense_model(settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch):
    compared = []
    loss = engine.distillation_loss
    monkeypatch.setattr(engine, "distillation_loss", lambda *args: (compared.append(args), loss(*args))[1])
    finetune(replace(settings, recipe="add", distill_weight=0.5, stage2=StageSettings(epochs=0)))
    assert len(compared) == 3  # the steps of stage 1
    _, teacher, temperature = compared[0]
    assert teacher.shape == (12, 3) and not teacher.requires_grad and temperature == 2.0


def test_skipped_pictures_are_listed_beside_the_run(settings: FinetuneSettings, folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "train" / "red" / "cut.png").write_bytes(b"\x89PNG")
    result = finetune(replace(settings, data=tmp_path / "damaged", recipe="mult"))
    listed = json.loads((result.folder / "skipped.json").read_text())
    assert [entry["name"] for entry in listed] == ["train/red/cut.png"]


def test_what_cannot_be_trained_is_said_in_one_line(settings: FinetuneSettings, tmp_path: Path):
    def complaint(**changes) -> str:
        with pytest.raises(UserError) as caught:
            finetune(replace(settings, **changes))
        return str(caught.value)

    none = StageSettings(epochs=0)
    assert "there is no recipe 'nonsense'" in complaint(recipe="nonsense")
    assert "a recipe has no nonsense" in complaint(recipe_args=("nonsense=1",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shiftadd3d.vision.finetune.open_data", lambda *_: pytest.fail("pictures were opened first"))
        assert "timm knows no model 'deit_tiny_patch61'; expected one of" in complaint(model="deit_tiny_patch61")
    assert "cannot make deit_tiny_patch16_224 with embed_dim=17" in complaint(model_args=("embed_dim=17",))
    assert "expected KEY=VALUE" in complaint(model_args=("depth",))
    assert "--image-size 4: expected 8 or more" in complaint(image_size=4)
    assert "--stage1.epochs -1: expected 0 or more" in complaint(stage1=StageSettings(epochs=-1))
    assert "expected an even number" in complaint(batch_size=13, mixup=0.5)
    assert "expected one of the two" in complaint(pretrained=True, start_from=tmp_path)
    assert "no config.json there" in complaint(start_from=tmp_path)
    assert "no such file or folder" in complaint(start_from=tmp_path / "nowhere")
    assert "--image-size 30: the model's patches have 8 px; expected a multiple" in complaint(image_size=30)
    for name, number in (
        *(("workers", -1), ("hflip", 3.0), ("random_erase", 7.0), ("min_scale", 2.0), ("mixup", -1.0), ("seed", -1)),
        *(("weight_decay", float("nan")), ("moe_weight", -1.0), ("clip_grad", float("inf")), ("cutmix", -0.5)),
    ):
        assert complaint(**{name: number}).startswith(f"--{name.replace('_', '-')} {number:g}: expected ")
    assert "--stage0.warmup-epochs nan: expected 0 or more" in complaint(
        stage0=StageSettings(warmup_epochs=float("nan"))
    )
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'} is a file; expected a folder" in complaint(output_dir=tmp_path / "file")
    assert "there is nothing to train" in complaint(stage0=none, stage1=none, stage2=none)
    assert not (tmp_path / "outputs").exists()  # none of these was the beginning of a run


def test_key_values():
    words = ("depth=6", "rate=0.5", "act=gelu", "flag=True", "sizes=(1,2)", "empty=")
    expected = {"depth": 6, "rate": 0.5, "act": "gelu", "flag": True, "sizes": (1, 2), "empty": ""}
    assert parse_key_values("--model-args", words) == expected
    with pytest.raises(UserError, match="--model-args =3: expected KEY=VALUE"):
        parse_key_values("--model-args", ("=3",))


def test_settings_survive_a_round_through_json(settings: FinetuneSettings):
    settings = replace(settings, ema=0.99, recipe_args=("bits=5",), start_from=Path("somewhere"))
    assert FinetuneSettings.from_dict(json.loads(json.dumps(settings.as_dict()))) == settings
    with pytest.raises(UserError, match="unknown settings nonsense; expected some of amp, "):
        FinetuneSettings.from_dict({"nonsense": 1})


# --------------------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_of_models_that_timm_knows(name: str):
    import timm

    preset = PRESETS[name]
    preset.validate()
    assert timm.is_model(preset.model)
    assert not preset.pretrained or timm.get_pretrained_cfg(preset.model).has_weights


def test_defaults_come_from_the_preset_the_data_or_the_run(run: Path):
    def changed(*args: str) -> FinetuneSettings:
        return cli.Finetune.with_defaults(args)

    assert changed().model_args == PRESETS["digits"].model_args
    assert changed("--data", "somewhere", "--no-pretrained").image_size == PRESETS["small"].image_size == 64
    assert changed("--data", "somewhere", "--preset=pvt-v2-b3").model == "pvt_v2_b3"
    resumed = changed("--stage2.epochs", "9", "--resume", str(run))
    assert resumed.data == read_settings(run).data and resumed.stage0.epochs == 2
    assert changed("--resume", "nowhere").model_args == PRESETS["digits"].model_args


def test_the_command_runs_is_interrupted_and_resumed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    step = engine._Training._step

    def interrupt(self, *args):
        self.interrupted = self.batch == 1
        return step(self, *args)

    monkeypatch.setattr(engine._Training, "_step", interrupt)
    monkeypatch.chdir(tmp_path)
    model = ["patch_size=8", "embed_dim=16", "depth=1", "num_heads=2"]
    epochs = [word for number in range(3) for word in (f"--stage{number}.epochs", "1")]
    arguments = ["--data", str(folder), "--image-size", "16", "--batch-size", "12", "--name", "run", *epochs]
    assert cli.main(["finetune", *arguments, "--recipe", "add", "--model-args", *model]) == 130
    printed = capsys.readouterr()
    assert "Interrupted; nothing is lost" in printed.out
    assert printed.err == "go on with: shiftadd3d finetune --resume outputs/run\ninterrupted\n"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "outputs")
    assert cli.main(["finetune", "--resume", "run", "--stage1.epochs", "2"]) == 0
    printed = capsys.readouterr().out
    assert "going on at epoch 1, step 3" in printed and "stage1-add" in printed
    history = json.loads((tmp_path / "outputs" / "run" / "stage1-add" / "history.json").read_text())
    assert len(history["epochs"]) == 2
    for arguments, complaint in (
        (["--resume", "nowhere"], "--resume nowhere: no such file or folder; expected the folder of an earlier run"),
        (["--resume", "run", "--recipe", "moe"], "was begun with other --recipe"),
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--batch-size", "0"], "--batch-size 0: expected 1 or more"),
    ):
        assert cli.main(["finetune", *arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and complaint in error


def test_wrong_options_of_the_command_exit_with_2():
    for arguments in (["--preset", "huge"], ["--stage0.epochs", "many"], ["--stage3.epochs", "1"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["finetune", *arguments])
        assert exit_.value.code == 2


# --------------------------------------------------------------------------------------------------------------------
# Saved classifiers
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mult", "add", "add+shift", "moe"])
def test_a_saved_classifier_of_any_recipe_loads_as_it_was(name: str, config: ClassifierConfig, tmp_path: Path):
    config = replace(config, recipe=recipe(name, bits=5))
    model = create_classifier(config).eval()
    save_classifier(tmp_path, model.state_dict(), config)
    loaded = load(tmp_path)
    assert loaded.classifier_config == config and not loaded.training
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), model(images))
    assert torch.equal(load(tmp_path / "model.safetensors")(images), model(images))


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_all_files_of_a_saved_classifier_can_be_read_by_whom_the_umask_lets(
    umask: int, config: ClassifierConfig, tmp_path: Path
):
    before = os.umask(umask)
    try:
        save_classifier(tmp_path, create_dense(config).state_dict(), config)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"config.json": 0o666 & ~umask, "model.safetensors": 0o666 & ~umask}


def test_reparameterizing_in_two_stages_is_the_same_as_at_once(config: ClassifierConfig):
    from shiftadd3d.nn import reparameterize_

    chosen = recipe("add+shift-attn+moe")
    first, second = chosen.stages()
    staged = create_dense(config)
    reparameterize_(staged, first, verbose=False)
    reparameterize_(staged, second, verbose=False)
    at_once = create_classifier(replace(config, recipe=chosen))
    assert [(n, t.shape) for n, t in staged.state_dict().items()] == [
        (n, t.shape) for n, t in at_once.state_dict().items()
    ]
    assert [type(m) for m in staged.modules()] == [type(m) for m in at_once.modules()]
    assert any(isinstance(module, ShiftLinear) for module in staged.modules())


def test_timms_tools_see_what_pictures_the_classifier_expects(config: ClassifierConfig):
    import timm

    config = replace(config, input=InputConfig(16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.8))
    seen = timm.data.resolve_model_data_config(create_classifier(config))
    assert seen["input_size"] == (3, 16, 16) and seen["mean"] == (0.1, 0.2, 0.3)
    assert seen["interpolation"] == "bilinear" and seen["crop_pct"] == 0.8


def test_what_is_no_classifier_is_refused_in_one_line(config: ClassifierConfig, tmp_path: Path):
    def complaint(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            load(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no config.json there; expected a folder that" in complaint(tmp_path)
    (tmp_path / "run" / "stage1-add" / "best").mkdir(parents=True)
    (tmp_path / "run" / "stage1-add" / "best" / "config.json").write_text("{}")
    assert f"no config.json there; there is one in {tmp_path}/run/stage1-add/best" in complaint(tmp_path / "run")
    file = tmp_path / "config.json"
    file.write_text("{")
    assert "config.json: not JSON" in complaint(tmp_path)
    file.write_text('{"architecture": "resnet50"}')
    assert "not the configuration of a classifier of ours" in complaint(tmp_path)
    file.write_text(json.dumps({**config.as_dict(), "version": 99}))
    assert "of format version 99; this shiftadd3d reads 1" in complaint(tmp_path)
    whole = config.as_dict()
    del whole["classes"]
    file.write_text(json.dumps(whole))
    assert "'classes' is missing" in complaint(tmp_path)
    whole = config.as_dict()
    whole["input"] = {**whole["input"], "bla": 1}
    file.write_text(json.dumps(whole))
    assert "not a configuration of this version (input has no bla); expected a folder" in complaint(tmp_path)
    file.write_text(json.dumps({**config.as_dict(), "input": "large"}))
    assert "not a configuration of a classifier (dictionary update" in complaint(tmp_path)
    (tmp_path / "model.onnx").write_text("")
    assert "model.onnx: not a file of a saved classifier" in complaint(tmp_path / "model.onnx")
    file.write_text(json.dumps(config.as_dict()))
    assert "model.safetensors: no such file" in complaint(tmp_path)
    save_classifier(
        tmp_path, create_dense(replace(config, model_args={**config.model_args, "depth": 1})).state_dict(), config
    )
    assert "weights of another model than deit_tiny_patch16_224: blocks.1.norm1.weight is missing" in complaint(
        tmp_path
    )
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "damaged, or no weights that can be read safely" in complaint(tmp_path)
