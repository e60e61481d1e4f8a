"""The recipes for folders of images, on a few tiny images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.io import write_png

from lightning_prune import ConfigurationError
from lightning_prune.cli import main
from lightning_prune.recipes import ImageFolderDataModule
from lightning_prune.report import PruneReport

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "imagenet").glob("*.yaml"))


@pytest.fixture
def images(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for kind in ("cat", "dog"):
            folder = tmp_path / "images" / part / kind
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = torch.randint(256, (3, 40, 50), generator=generator, dtype=torch.uint8)
                write_png(pixels, str(folder / f"{number}.png"))
    return tmp_path / "images"


def test_images_have_the_size_that_was_asked_for(images):
    data = ImageFolderDataModule(str(images), batch_size=3, size=32, workers=0)
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        batches = list(loader)
        assert [tuple(batch[0].shape) for batch in batches] == [(3, 3, 32, 32), (3, 3, 32, 32), (2, 3, 32, 32)]
        assert {int(label) for batch in batches for label in batch[1]} == {0, 1}
    first = next(iter(data.val_dataloader()))[0]
    assert -3 < float(first.min()) < float(first.max()) < 3


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match="there is no folder"):
        ImageFolderDataModule(str(tmp_path)).setup()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_run_on_a_small_network(recipe, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = recipe.read_text().replace("init_args: {remove", f"init_args: {{directory: {tmp_path}, remove")
    config = tmp_path / "recipe.yaml"
    config.write_text(text)
    small = ["--model.init_args.name=resnet18", "--model.init_args.num_classes=2", "--trainer.precision=32"]
    data = [f"--data.init_args.{o}" for o in (f"data_dir={images}", "batch_size=4", "size=32", "workers=0")]
    quiet = ["accelerator=cpu", "max_epochs=1", "logger=false", "enable_progress_bar=false"]
    options = [*small, *data, *(f"--trainer.{option}" for option in quiet)]
    assert main(["fit", "--config", str(config), *options]) == 0
    assert PruneReport.from_json(tmp_path / "report.json").reached >= 0.69
