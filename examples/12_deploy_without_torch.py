"""Classify a picture with what `shiftadd3d export --formats so` wrote.

    python 12_deploy_without_torch.py DIR/so photo.jpg

Needs numpy, pillow and apache-tvm-ffi, and neither torch nor shiftadd3d. It runs native code: check the folder first
(`sha256sum --check SHA256SUMS`), and that you trust its maker.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

import numpy as np
import tvm_ffi
from PIL import Image, ImageOps

if len(sys.argv) != 3:
    sys.exit("usage: python 12_deploy_without_torch.py DIR/so PICTURE")
folder = Path(sys.argv[1]).resolve()
if not (folder / "executable.json").is_file():
    sys.exit(f"{folder} has no executable.json: name the folder that `shiftadd3d export --formats so` wrote")
about = json.loads((folder / "executable.json").read_text(encoding="utf-8"))
lacking = set(about["cpu"]) - set(Path("/proc/cpuinfo").read_text().split())
if lacking:
    sys.exit(f"this CPU lacks {', '.join(sorted(lacking))}")
if "amx_tile" in about["cpu"]:  # Linux hands out AMX's registers on request only
    ctypes.CDLL(None).syscall(158, 0x1023, 18)

ctypes.CDLL(str(folder / "libtvm_runtime.so"), ctypes.RTLD_GLOBAL)
tvm_ffi.get_global_func("vm.builtin.tensor_cache.load")(str(folder), 1, 0)
weights = tvm_ffi.get_global_func("vm.builtin.param_array_from_cache")("param", -1)

seen = about["classifier"]["input"]
picture = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("RGB")
shorter = int(seen["size"] / seen["crop_pct"])
sides = [side * shorter // min(picture.size) for side in picture.size]
picture = picture.resize(sides, Image.Resampling[seen["interpolation"].upper()])
left, top = (round((side - seen["size"]) / 2) for side in picture.size)
pixels = np.asarray(picture.crop((left, top, left + seen["size"], top + seen["size"])), np.float32) / 255
batch = ((pixels - np.float32(seen["mean"])) / np.float32(seen["std"])).transpose(2, 0, 1)[None].copy()


def classify(program: str) -> tuple[np.ndarray, bool]:
    """The logits, and whether the program could express all activations; if not, they mean nothing."""
    machine = tvm_ffi.load_module(str(folder / program))["vm_load_executable"]()
    machine["vm_initialization"](1, 0, 2)  # a CPU, with a pool of memory
    control = np.array([0, os.cpu_count()], np.int32)
    logits = machine["main"](*map(tvm_ffi.from_dlpack, (batch, control)), weights)
    return np.from_dlpack(logits)[0], control[0] == 0


logits, fits = classify(about["programs"][0])
if not fits:
    logits, _ = classify(about["programs"][-1])
shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
for number in shares.argsort()[::-1][:5]:
    print(f"{about['classifier']['classes'][number]} {shares[number]:.4f}")
