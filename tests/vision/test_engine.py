"""Training a stage: learning, resuming, interrupting, and what goes wrong."""

from __future__ import annotations

import copy
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from shiftadd3d import UserError
from shiftadd3d.nn import ShiftLinear, recipe, reparameterize_
from shiftadd3d.vision import engine
from shiftadd3d.vision.checkpoint import ClassifierConfig, create_dense, load
from shiftadd3d.vision.data import PictureData
from shiftadd3d.vision.engine import distillation_loss, evaluate, make_optimizer, train
from shiftadd3d.vision.settings import FinetuneSettings, StageSettings

STAGE = StageSettings(epochs=6, lr=5e-3)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_model_learns_and_its_best_weights_come_back(
    model: nn.Module, data: PictureData, config: ClassifierConfig, settings: FinetuneSettings, tmp_path: Path
):
    trained = train(model, data, config, STAGE, settings, folder=tmp_path / "stage")
    assert trained.metrics.top1 >= 0.9
    assert [record["epoch"] for record in trained.history] == [1, 2, 3, 4, 5, 6]
    assert trained.history[-1]["train_loss"] < trained.history[0]["train_loss"]
    assert not trained.model.training and all(p.requires_grad for p in trained.model.parameters())
    loaded = load(tmp_path / "stage" / "best")
    assert same(weights_of(loaded), weights_of(trained.model))
    assert evaluate(loaded, data.val, config.input) == trained.metrics
    history = json.loads((tmp_path / "stage" / "history.json").read_text())
    assert history["finished"] and history["validation"]["top1"] == trained.metrics.top1
    assert list((tmp_path / "stage").glob("events.out.tfevents.*"))


def test_without_a_folder_nothing_is_written_and_the_result_is_the_same(
    model: nn.Module, data: PictureData, config: ClassifierConfig, settings: FinetuneSettings, tmp_path: Path
):
    stage = StageSettings(epochs=2, lr=3e-3)
    other = copy.deepcopy(model)
    in_memory = train(model, data, config, stage, settings)
    on_disk = train(other, data, config, stage, settings, folder=tmp_path / "stage")
    assert same(weights_of(in_memory.model), weights_of(on_disk.model))


@pytest.mark.usefixtures("ctrl_c_interrupts")
@pytest.mark.parametrize("recipe_name", ["mult", "moe"])
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(
    recipe_name: str,
    model: nn.Module,
    data: PictureData,
    config: ClassifierConfig,
    settings: FinetuneSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    settings = replace(settings, ema=0.9, mixup=0.4, cutmix=0.5)
    chosen = recipe(recipe_name, latencies=(2.0, 1.0))
    reparameterize_(model, chosen, verbose=False)
    config = replace(config, recipe=chosen)
    stage = StageSettings(epochs=2, lr=3e-3)
    other = copy.deepcopy(model)
    through = train(copy.deepcopy(model), data, config, stage, settings, folder=tmp_path / "through")

    steps = 0
    step = engine._Training._step

    def step_and_interrupt(self, *args):
        nonlocal steps
        steps += 1
        if steps == 5:  # in the middle of the second epoch
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(engine._Training, "_step", step_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(model, data, config, stage, settings, folder=tmp_path / "cut")
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    state = torch.load(tmp_path / "cut" / "state.pt", weights_only=True)
    assert (state["epoch"], state["batch"]) == (1, 2)
    resumed = train(other, data, config, stage, settings, folder=tmp_path / "cut")
    assert same(weights_of(resumed.model), weights_of(through.model))
    drop_time = [{**record, "seconds": 0} for record in through.history]
    assert [{**record, "seconds": 0} for record in resumed.history] == drop_time
    # A finished training is only read back.
    again = train(copy.deepcopy(other), data, config, stage, settings, folder=tmp_path / "cut")
    assert same(weights_of(again.model), weights_of(through.model))


def test_a_model_with_gradients_goes_on_from_a_state(
    model: nn.Module, data: PictureData, config: ClassifierConfig, settings: FinetuneSettings, tmp_path: Path
):
    train(copy.deepcopy(model), data, config, StageSettings(epochs=1), settings, folder=tmp_path)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    trained = train(model, data, config, StageSettings(epochs=2), settings, folder=tmp_path)
    assert len(trained.history) == 2


def test_a_moving_average_that_begins_late_begins_with_the_trained_weights(
    model: nn.Module, data: PictureData, config: ClassifierConfig, settings: FinetuneSettings, tmp_path: Path
):
    other = copy.deepcopy(model)
    train(model, data, config, StageSettings(epochs=3, lr=1e-2), settings, folder=tmp_path)
    still = StageSettings(epochs=4, lr=1e-9)
    history = train(other, data, config, still, replace(settings, ema=0.9999), folder=tmp_path).history
    assert history[3]["val_loss"] == pytest.approx(history[2]["val_loss"], abs=1e-4)


def test_going_on_may_change_weight_decay_but_not_what_the_optimizers_state_hangs_on(
    model: nn.Module,
    data: PictureData,
    config: ClassifierConfig,
    settings: FinetuneSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    train(copy.deepcopy(model), data, config, StageSettings(epochs=1), settings, folder=tmp_path)
    with pytest.raises(UserError, match=r"begun with --opt adamw, not sgd; expected the same"):
        train(copy.deepcopy(model), data, config, STAGE, replace(settings, opt="sgd"), folder=tmp_path)
    with pytest.raises(UserError, match=r"begun with layer-decay None, not 0\.5; expected the same"):
        train(copy.deepcopy(model), data, config, replace(STAGE, layer_decay=0.5), settings, folder=tmp_path)
    # Of a finished training the optimizer is no longer needed.
    train(copy.deepcopy(model), data, config, StageSettings(epochs=1), replace(settings, opt="sgd"), folder=tmp_path)
    decays: set[float] = set()
    step = engine._Training._step

    def watched(self, *args):
        decays.update(group["weight_decay"] for group in self.optimizer.param_groups)
        return step(self, *args)

    monkeypatch.setattr(engine._Training, "_step", watched)
    train(model, data, config, StageSettings(epochs=2), replace(settings, weight_decay=0.5), folder=tmp_path)
    assert decays == {0.0, 0.5}


def test_a_frozen_backbone_stays_what_it_was(
    model: nn.Module, data: PictureData, config: ClassifierConfig, settings: FinetuneSettings
):
    before = weights_of(model)
    trained = train(model, data, config, StageSettings(epochs=2, lr=1e-2, freeze_backbone=True), settings)
    changed = {name for name, tensor in trained.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_layer_decay_gives_early_blocks_lower_rates(model: nn.Module, settings: FinetuneSettings):
    optimizer = make_optimizer(model, StageSettings(lr=1.0, layer_decay=0.5), settings)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert scale[id(named["head.weight"])] == 1.0
    assert scale[id(named["blocks.0.attn.qkv.weight"])] == 0.5 * scale[id(named["blocks.1.attn.qkv.weight"])]
    assert scale[id(named["patch_embed.proj.weight"])] < scale[id(named["blocks.0.attn.qkv.weight"])]
    assert len(scale) == len(named)


def test_shifts_and_signs_biases_and_norms_have_no_weight_decay(model: nn.Module, settings: FinetuneSettings):
    reparameterize_(model, recipe("add+shift", mode="PS"), verbose=False)
    optimizer = make_optimizer(model, StageSettings(), settings)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert any(isinstance(module, ShiftLinear) for module in model.modules())
    assert "head.weight" in names
    assert not [name for name in names if name.endswith((".shift", ".sign", ".bias", "norm1.weight", "pos_embed"))]


def test_the_balance_losses_move_the_routers(
    model: nn.Module, data: PictureData, config: ClassifierConfig, settings: FinetuneSettings
):
    chosen = recipe("add+shift-attn+moe", latencies=(9.0, 1.0))
    reparameterize_(model, chosen, verbose=False)
    trained = train(
        model,
        data,
        replace(config, recipe=chosen),
        StageSettings(epochs=8, lr=1e-2),
        replace(settings, moe_weight=10.0),
    )
    first, last = (trained.history[i]["moe_loss"] for i in (0, -1))
    assert last < first
    assert set(trained.history[0]["mult_shares"]) == {"blocks.0.mlp", "blocks.1.mlp"}
    assert sum(trained.history[-1]["mult_shares"].values()) / 2 < 0.35


def test_a_student_comes_nearer_to_its_teacher(
    model: nn.Module, data: PictureData, config: ClassifierConfig, settings: FinetuneSettings
):
    teacher = train(copy.deepcopy(model), data, config, STAGE, settings).model
    images = torch.stack([torch.randn(3, 16, 16) for _ in range(8)])

    def distance(student: nn.Module) -> float:
        with torch.no_grad():
            return float(distillation_loss(student(images), teacher(images), 2.0))

    before = distance(model.eval())
    settings = replace(settings, distill_weight=1.0)
    assert distance(train(model, data, config, STAGE, settings, teacher=teacher).model) < before


def test_distillation_is_the_divergence_of_softened_predictions():
    student, teacher = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    expected = 9 * (p * (p.log() - q.log())).sum(-1).mean()
    assert torch.allclose(distillation_loss(student, teacher, 3.0), expected)
    assert float(distillation_loss(teacher, teacher, 3.0)) == pytest.approx(0, abs=1e-12)


def test_bfloat16_autocast_trains(
    model: nn.Module, data: PictureData, config: ClassifierConfig, settings: FinetuneSettings
):
    trained = train(model, data, config, StageSettings(epochs=3, lr=5e-3), replace(settings, amp="bfloat16"))
    assert trained.history[-1]["train_loss"] < trained.history[0]["train_loss"]
    assert all(parameter.dtype == torch.float32 for parameter in trained.model.parameters())


# --------------------------------------------------------------------------------------------------------------------
# What goes wrong
# --------------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_whole_epoch(
    model: nn.Module,
    data: PictureData,
    config: ClassifierConfig,
    settings: FinetuneSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    loss = engine.classification_loss
    monkeypatch.setattr(
        engine, "classification_loss", lambda *args: loss(*args) * (float("nan") if len(seen) == 4 else 1.0)
    )
    seen: list[int] = []
    step = engine._Training._step
    monkeypatch.setattr(engine._Training, "_step", lambda self, *args: (seen.append(0), step(self, *args))[1])
    with pytest.raises(UserError, match=r"the loss is nan in epoch 2, step 1 .*lower learning rate.*is kept in"):
        train(model, data, config, STAGE, settings, folder=tmp_path / "stage")
    state = torch.load(tmp_path / "stage" / "state.pt", weights_only=True)
    assert state["epoch"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())
    load(tmp_path / "stage" / "best")


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(
    model: nn.Module, data: PictureData, config: ClassifierConfig, settings: FinetuneSettings
):
    model.head.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(UserError, match=r"the gradient's norm is (inf|nan) in epoch 1, step 1"):
        train(model, data, config, STAGE, settings)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_batch_larger_than_the_set(
    model: nn.Module, data: PictureData, config: ClassifierConfig, settings: FinetuneSettings
):
    with pytest.raises(UserError, match="--batch-size 64: there are only 36 training pictures"):
        train(model, data, config, STAGE, replace(settings, batch_size=64))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_no_memory_left_is_one_line_with_the_way_out(
    error: Exception, model: nn.Module, data: PictureData, config: ClassifierConfig, settings: FinetuneSettings
):
    def fail(module, args):
        raise error

    model.register_forward_pre_hook(fail)
    with pytest.raises(UserError, match="out of memory on cpu with batches of 12 pictures of 16 px"):
        train(model, data, config, STAGE, settings)


def test_an_error_that_is_not_about_memory_stays_what_it_is(
    model: nn.Module, data: PictureData, config: ClassifierConfig, settings: FinetuneSettings
):
    def fail(module, args):
        raise RuntimeError("a bug")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a bug"):
        train(model, data, config, STAGE, settings)


def test_a_full_disk_keeps_the_state_from_before(
    model: nn.Module,
    data: PictureData,
    config: ClassifierConfig,
    settings: FinetuneSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    save = torch.save
    calls: list[int] = []

    def full(state, file):
        calls.append(0)
        if len(calls) == 2:
            Path(file).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"cannot write .*state\.pt \(No space left on device\).*from before is kept"):
        train(model, data, config, STAGE, settings, folder=tmp_path / "stage")
    assert torch.load(tmp_path / "stage" / "state.pt", weights_only=True)["epoch"] == 1
    assert not list((tmp_path / "stage").glob(".*unfinished"))


def test_a_state_that_is_damaged_foreign_or_of_another_model(
    model: nn.Module, data: PictureData, config: ClassifierConfig, settings: FinetuneSettings, tmp_path: Path
):
    train(copy.deepcopy(model), data, config, StageSettings(epochs=1), settings, folder=tmp_path)
    whole = (tmp_path / "state.pt").read_bytes()
    other = ClassifierConfig("deit_tiny_patch16_224", data.classes, config.input, {**config.model_args, "depth": 1})
    with pytest.raises(UserError, match="the state of another training than this one"):
        train(create_dense(other), data, other, STAGE, settings, folder=tmp_path)
    (tmp_path / "state.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"state\.pt: damaged, or not a state that can be read safely"):
        train(model, data, config, STAGE, settings, folder=tmp_path)
    torch.save({"made": "by something else"}, tmp_path / "state.pt")
    with pytest.raises(UserError, match="not the state of a training of this version"):
        train(model, data, config, STAGE, settings, folder=tmp_path)


def test_an_optimizer_that_timm_does_not_know(
    model: nn.Module, data: PictureData, config: ClassifierConfig, settings: FinetuneSettings
):
    with pytest.raises(UserError, match=r"--opt nonsense: .*expected one of timm"):
        train(model, data, config, STAGE, replace(settings, opt="nonsense"))


def test_a_device_that_is_not_there(
    model: nn.Module, data: PictureData, config: ClassifierConfig, settings: FinetuneSettings
):
    with pytest.raises(UserError, match=r"--device nonsense: .*expected cpu, cuda or cuda:1"):
        train(model, data, config, STAGE, replace(settings, device="nonsense"))
    with pytest.raises(UserError, match="a CPU computes in float32 or bfloat16"):
        train(model, data, config, STAGE, replace(settings, amp="float16", device="cpu"))
