"""A tiny random pipeline that every quick test shares: the real classes, small, with no gate left at zero."""

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")     # before torch is loaded: a test process a core (-n auto)

import pytest
import torch

from purecc_min.commands.folder import load_concept
from purecc_min.measure.toy import FOLDER
from tinyflow.mmdit import MMDiTConfig
from tinyflow.picturebook.model import make_tiny
from tinyflow.pipeline import Pipeline


def make_pipe(**config) -> Pipeline:
    torch.manual_seed(0)
    small = dict(width=32, depth=3, heads=2, context_width=16, pooled_width=16)
    pipe = make_tiny(MMDiTConfig(**{**small, **config}))
    with torch.no_grad():
        for parameter in pipe.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return pipe.requires_grad_(False).eval()


@pytest.fixture
def pipe() -> Pipeline:
    return make_pipe()


@pytest.fixture(scope="session")
def robot():
    return load_concept(FOLDER / "checked_robot", "robot", 64)


@pytest.fixture(scope="session")
def sd3(tmp_path_factory):
    """A small Stable Diffusion 3 with random weights: its diffusers folder, and diffusers' own pipeline."""
    from tests.public import write_sd3
    folder = tmp_path_factory.mktemp("public") / "sd3"
    return folder, write_sd3(folder)


@pytest.fixture(params=["with T5", "without T5"])
def sd3_in_both_forms(request, sd3, tmp_path):
    """The same with T5, or as a user may download it, without."""
    folder, pipeline = sd3
    if request.param == "with T5":
        return sd3
    left_out = shutil.ignore_patterns("text_encoder_3", "tokenizer_3")
    without = type(pipeline)(**pipeline.components | {"text_encoder_3": None, "tokenizer_3": None})
    without.set_progress_bar_config(disable=True)
    return shutil.copytree(folder, tmp_path / "sd3", ignore=left_out), without


@pytest.fixture(scope="module")
def few_pictures():
    """A few of each group are drawn and measured, for tests of the machinery."""
    from purecc_min.measure.toy import Toy
    all_prompts, all_forms = Toy.prompts, Toy.forms

    def few(groups):                             # 12 of the others are seen combinations
        return {group: prompts[:14 if group == "other" else 4] for group, prompts in groups.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Toy, "prompts", lambda self: few(all_prompts(self)))
        patch.setattr(Toy, "forms", lambda self: few(all_forms(self)))
        yield
