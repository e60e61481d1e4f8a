"""Every recipe runs from the command line, on data that ships with a dependency."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_prune.cli import main
from lightning_prune.report import PruneReport

RECIPES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
SMALL = {
    "DigitsResNet": ["--model.init_args.width=8", "--model.init_args.blocks=1"],
    "MultilayerPerceptron": ["--model.init_args.hidden=[32,16]"],
}
SHORT = [
    "--trainer.max_epochs=4",
    "--trainer.limit_train_batches=6",
    "--trainer.limit_val_batches=1",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_reaches_what_it_asks_for(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = recipe.read_text().replace("{rounds: 100}", "{rounds: 5}")
    written = text.replace("init_args: {remove", f"init_args: {{directory: {tmp_path}, remove").replace(": 20}", ": 3}")
    config = tmp_path / "recipe.yaml"
    config.write_text(written)
    assert str(tmp_path) in written
    small = next(options for name, options in SMALL.items() if f"recipes.{name}" in text)
    assert main(["fit", "--config", str(config), *small, *SHORT]) == 0
    report = PruneReport.from_json(tmp_path / "report.json")
    assert report.requested is not None
    assert report.reached >= report.requested.fraction - 0.03
    assert (tmp_path / "pruned.ckpt").exists()
