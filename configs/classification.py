"""Presets of `shiftadd3d finetune`: a model, how pictures are changed at random, and what each stage does."""

from __future__ import annotations

from shiftadd3d.vision.settings import FinetuneSettings, StageSettings

#: Under two minutes on two cores. Strokes have no colours and no mirror images, and little room around them.
DIGITS = FinetuneSettings(
    model="deit_tiny_patch16_224",
    model_args=(
        "patch_size=4",
        "embed_dim=64",
        "depth=3",
        "num_heads=4",
        "weight_init=jax",
        "global_pool=avg",
        "class_token=False",
    ),
    image_size=16,
    batch_size=32,
    hflip=0.0,
    min_scale=0.9,
    color_jitter=0.0,
    label_smoothing=0.0,
    stage0=StageSettings(epochs=10, lr=3e-3),
    stage1=StageSettings(epochs=4, lr=1.5e-3),
    stage2=StageSettings(epochs=4, lr=1.5e-3),
)

#: Some thousand pictures from random weights on a laptop CPU, minutes to an hour.
SMALL = FinetuneSettings(
    model="deit_tiny_patch16_224",
    model_args=(
        "patch_size=8",
        "embed_dim=128",
        "depth=6",
        "num_heads=4",
        "weight_init=jax",
        "global_pool=avg",
        "class_token=False",
    ),
    image_size=64,
    min_scale=0.3,
    stage0=StageSettings(epochs=40, lr=1e-3, warmup_epochs=3.0),
    stage1=StageSettings(epochs=15, lr=5e-4),
    stage2=StageSettings(epochs=15, lr=5e-4),
)

#: Some thousand pictures from timm's pretrained weights on a laptop CPU, minutes to half an hour. At half the size
#: there is a quarter of the patches. Stage 0 trains the new head alone, on what the network knows; the stages after it
#: train all, as every layer has to get used to what it has become.
LAPTOP = FinetuneSettings(
    model="deit_tiny_patch16_224",
    pretrained=True,
    image_size=112,
    batch_size=32,
    min_scale=0.35,
    stage0=StageSettings(epochs=8, lr=3e-3, warmup_epochs=0.5, freeze_backbone=True),
    stage1=StageSettings(epochs=8, lr=3e-4),
    stage2=StageSettings(epochs=6, lr=1e-4),
)


def _pretrained(model: str, drop_path: float) -> FinetuneSettings:
    # The paper's two stages on ImageNet have 100 epochs each; smaller sets need fewer.
    return FinetuneSettings(
        model=model,
        model_args=(f"drop_path_rate={drop_path:g}",),
        pretrained=True,
        batch_size=128,
        mixup=0.8,
        cutmix=1.0,
        auto_augment="rand-m9-mstd0.5-inc1",
        random_erase=0.25,
        ema=0.999,
        stage0=StageSettings(epochs=20, lr=5e-4, warmup_epochs=2.0, layer_decay=0.75),
        stage1=StageSettings(epochs=30, lr=3e-4, warmup_epochs=2.0),
        stage2=StageSettings(epochs=30, lr=1e-4, warmup_epochs=2.0),
    )


PRESETS: dict[str, FinetuneSettings] = {
    "digits": DIGITS,
    "small": SMALL,
    "laptop": LAPTOP,
    "deit-tiny": _pretrained("deit_tiny_patch16_224", 0.0),
    "deit-small": _pretrained("deit_small_patch16_224", 0.1),
    "vit-tiny": _pretrained("vit_tiny_patch16_224", 0.0),
    "pvt-v2-b0": _pretrained("pvt_v2_b0", 0.0),
    "pvt-v2-b1": _pretrained("pvt_v2_b1", 0.1),
    "pvt-v2-b2": _pretrained("pvt_v2_b2", 0.1),
    "pvt-v2-b3": _pretrained("pvt_v2_b3", 0.2),
    "pvt-v2-b4": _pretrained("pvt_v2_b4", 0.3),
    "pvt-v2-b5": _pretrained("pvt_v2_b5", 0.3),
}
