"""Open a trained run: nerfstudio's `config.yml` and the newest checkpoint beside it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from shiftadd3d._errors import UserError
from shiftadd3d.nerf.checkpoint import latest_checkpoint, read_checkpoint
from shiftadd3d.nerf.pipeline import GNTPipeline, GNTPipelineConfig
from shiftadd3d.nerf.render_options import EXPECTED_CONFIG, check_config_file
from shiftadd3d.nerf.trainer import GNTTrainerConfig


class Run(NamedTuple):
    """A trained model, ready to render."""

    config: GNTTrainerConfig
    pipeline: GNTPipeline
    """In evaluation mode, with the test views as its evaluation views."""
    checkpoint: Path
    step: int


def read_config(path: Path) -> GNTTrainerConfig:
    """The configuration in a run's `config.yml`.

    The file is nerfstudio's YAML, which names Python objects. Reading it can run code, so open only files that you
    trust.

    Raises:
        UserError: no such file, not a configuration, or the configuration of another project's method.
    """
    check_config_file(path)
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {EXPECTED_CONFIG}") from None
    except (yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a configuration ({str(error).splitlines()[0]}); {EXPECTED_CONFIG}") from None
    if not isinstance(config, GNTTrainerConfig) or not isinstance(config.pipeline, GNTPipelineConfig):
        method = getattr(config, "method_name", None)
        raise UserError(
            f"{path}: {f'of method {method!r}' if method else 'not a configuration of ours'}; {EXPECTED_CONFIG}"
        )
    return config


def load_run(path: Path) -> Run:
    """The newest checkpoint of a run, with its scene.

    This does what nerfstudio's `eval_setup` does. It also opens run folders that have been moved, and explains missing
    or damaged files.

    Args:
        path: the run's `config.yml`. Only open files that you trust; see `read_config`.

    Raises:
        UserError: anything wrong with the configuration, the checkpoint, or the scene.
    """
    config = read_config(path)
    config.lie_at(path)
    config.load_dir = config.get_base_dir() / config.relative_model_dir
    checkpoint = latest_checkpoint(config.load_dir)
    state = read_checkpoint(checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline: GNTPipeline = config.pipeline.setup(device=device, test_mode="test")
    pipeline.eval()
    pipeline.load_pipeline(state["pipeline"], state["step"])
    return Run(config, pipeline, checkpoint, state["step"])
