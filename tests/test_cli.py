"""The command as a person meets it: help, spelling mistakes, one-line errors, a whole run from data to table."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rocket_fast import cli, presets
from rocket_fast.__main__ import main
from rocket_fast.config import TrainConfig
from rocket_fast.errors import Failed
from rocket_fast.export import load_model
from rocket_fast.interop.open_clip_weights import write_open_clip
from rocket_fast.models.clip import CLIPConfig, DualEncoder
from rocket_fast.models.text import TextConfig
from rocket_fast.models.vision import ViTConfig


def test_help_lists_commands_and_every_option_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for command in ("train", "launch", "plan", "eval", "report", "export", "import", "presets", "data", "doctor"):
        assert command in text
    with pytest.raises(SystemExit):
        main(["train", "--preset", "vitb16-yfcc", "--help"])
    text = capsys.readouterr().out
    for option in (
        "--optim.lr",
        "--model.vision.patch-size",
        "--image.strong.1.scale",
        "--loop.epochs",
        "--data.train",
    ):
        assert option in text
    assert "Peak learning rate" in text
    commands = (
        ["data"],
        ["data", "emoji"],
        ["data", "check"],
        ["eval"],
        ["report"],
        ["export"],
        ["import"],
        ["plan"],
        ["launch"],
        ["launch", "local"],
        ["launch", "slurm"],
        ["presets"],
        ["doctor"],
    )
    for command in commands:
        with pytest.raises(SystemExit) as left:
            main([*command, "--help"])
        assert left.value.code == 0, command
    assert "0.003" in text


@pytest.mark.parametrize("arguments", [[], ["train", "--preset"], ["nothing-such"]])
def test_incomplete_commands_are_told_what_is_missing(arguments: list[str], capsys):
    with pytest.raises(SystemExit) as left:
        sys.exit(main(arguments))
    assert left.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_evaluation_data_is_missed_before_training(tiny_config: TrainConfig, capsys, monkeypatch):
    sets = (replace(tiny_config.eval.sets[0], shards=("nowhere-*.tar",)),)
    monkeypatch.setitem(
        presets.PRESETS, "tiny", lambda: replace(tiny_config, eval=replace(tiny_config.eval, sets=sets))
    )
    assert main(["train", "--preset", "tiny"]) == 2
    assert "nowhere-*.tar" in capsys.readouterr().err
    assert not tiny_config.folder.exists()


def test_a_misspelt_option_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit) as left:
        main(["train", "--preset", "demo", "--optim.rl", "1"])
    assert left.value.code == 2
    assert "--optim.lr" in capsys.readouterr().err


def test_a_misspelt_preset_suggests_the_nearest_in_one_line(capsys):
    assert main(["train", "--preset", "dmeo"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rocket-fast: preset: got 'dmeo', expected demo")
    assert error.count("\n") == 1


def test_a_bad_value_names_the_option(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--preset", "demo", "--optim.lr", "-1"])
    error = re.sub(r"[│\s]+", " ", capsys.readouterr().err)
    assert "Error parsing config.optim: optim.lr: got -1.0, expected a positive number" in error
    assert "see rocket-fast train --help" in error  # not that of all commands


def test_missing_data_is_one_line_with_the_remedy(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--preset", "demo"]) == 2
    error = capsys.readouterr().err
    assert "data/emoji" in error
    assert error.count("\n") == 1


def test_what_goes_wrong_outside_is_one_line(capsys, monkeypatch):
    def no_network(config):
        raise Failed("a package could not be fetched")

    monkeypatch.setattr(cli, "build_emoji", no_network)
    assert main(["data", "emoji"]) == 1
    assert capsys.readouterr().err == "rocket-fast: a package could not be fetched\n"


def test_presets_prints_the_recipe_with_its_cost(capsys):
    assert main(["presets"]) == 0
    assert "demo" in capsys.readouterr().out
    assert main(["presets", "vitb16-yfcc"]) == 0
    text = capsys.readouterr().out
    assert '"lr": 0.003' in text
    assert re.search(r"parameters\s*│\s*\d+\.\d M", text)
    assert "GFLOP" in text or "G forward" in text


def test_doctor_names_what_is_missing_and_what_is_chosen(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text
    assert "auto takes" in text
    assert torch.cuda.is_available() or "xformers: has no CPU operators" in " ".join(text.split())


def test_train_then_eval_then_check(tiny_config: TrainConfig, capsys, monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", lambda: tiny_config)
    assert main(["train", "--preset", "tiny", "--loop.epochs", "1"]) == 0
    table = capsys.readouterr().out
    assert "top-1" in table
    assert "captions-test.png" in table
    first = json.loads((tiny_config.folder / "eval.json").read_text())
    (tiny_config.folder / "eval.json").unlink()
    assert main(["eval", str(tiny_config.folder)]) == 0
    assert json.loads((tiny_config.folder / "eval.json").read_text()) == first
    assert main(["eval", str(tiny_config.folder), "--checkpoint", "best"]) == 0
    capsys.readouterr()
    assert main(["data", "check", *tiny_config.data.train]) == 0
    assert "100" in capsys.readouterr().out
    assert main(["eval", str(tiny_config.folder / "nowhere")]) == 2


def test_evaluating_a_run_without_sets_says_so(tiny_config: TrainConfig, capsys, monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", lambda: replace(tiny_config, eval=replace(tiny_config.eval, sets=())))
    assert main(["train", "--preset", "tiny", "--loop.max-steps", "2"]) == 0
    assert main(["eval", str(tiny_config.folder)]) == 2
    assert "eval.sets" in capsys.readouterr().err


def test_export_a_run_and_what_it_became(tiny_config: TrainConfig, capsys, monkeypatch, tmp_path: Path):
    monkeypatch.setitem(presets.PRESETS, "tiny", lambda: tiny_config)
    assert main(["train", "--preset", "tiny", "--loop.epochs", "1"]) == 0
    run, out = str(tiny_config.folder), tmp_path / "out"
    capsys.readouterr()
    assert main(["export", run, "--format", "safetensors", "--out", str(out), "--z-weight", "0.3"]) == 0
    assert capsys.readouterr().out == f"wrote {out / 'model.safetensors'}\n"
    saved = load_model(out / "model.safetensors")
    assert (saved.head, saved.z_weight, saved.image_size) == ("both", 0.3, 16)
    assert saved.model.config == tiny_config.model
    again = ["export", str(out / "model.safetensors"), "--format", "torch", "--out", str(tmp_path / "again")]
    assert main([*again, "--head", "h", "--checkpoint", "best"]) == 0
    record = json.loads((tmp_path / "again" / "export.json").read_text())
    assert (record["head"], record["z_weight"]) == ("h", 0.3)
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"image.pt2", "text.pt2", "export.json"}


EXPORT_ERRORS = {
    "head": (["--format", "open_clip"], "head: got 'both', expected z: open_clip's models project with one matrix"),
    "tower": (["--format", "hf", "--head", "z"], "vision: got ConvStemViTConfig, expected a ViT"),
    "weight": (["--format", "safetensors", "--z-weight", "2"], "z_weight: got 2.0, expected a number from 0 to 1"),
    "best": (["--format", "safetensors", "--checkpoint", "best"], "checkpoint: got 'best', expected last"),
}


@pytest.mark.parametrize("case", EXPORT_ERRORS)
def test_what_cannot_be_exported_is_one_line(case: str, tiny_config: TrainConfig, capsys, monkeypatch, tmp_path: Path):
    config = replace(tiny_config, eval=replace(tiny_config.eval, sets=()))
    monkeypatch.setitem(presets.PRESETS, "tiny", lambda: config)
    assert main(["train", "--preset", "tiny", "--loop.max-steps", "1"]) == 0
    capsys.readouterr()
    options, message = EXPORT_ERRORS[case]
    assert main(["export", str(config.folder), "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_import_then_export(capsys, tmp_path: Path):
    vision = ViTConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2)
    text = TextConfig(width=16, layers=1, heads=2, vocab_size=50, context_length=8)
    model = DualEncoder(CLIPConfig(vision=vision, text=text, embed_dim=8, h_head=None))
    write_open_clip(model, tmp_path / "theirs")
    out = tmp_path / "ours.safetensors"
    assert main(["import", str(tmp_path / "theirs"), "--out", str(out)]) == 0
    assert "ours.safetensors: ViT for 16 px" in capsys.readouterr().out
    assert load_model(out).model.config.vision == vision
    assert main(["export", str(out), "--format", "hf", "--out", str(tmp_path / "hf")]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "vision-text-dual-encoder"


def test_what_cannot_be_imported_is_one_line(capsys, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    torch.save({"visual.proj": torch.zeros(1)}, tmp_path / "vit.pt")
    out = ["--out", str(tmp_path / "out.safetensors")]
    for arguments, message in (
        ([str(tmp_path / "nowhere"), *out], "expected an existing file or folder"),
        ([str(tmp_path / "empty"), *out], "expected one with open_clip_config.json (open_clip) or config.json"),
        ([str(tmp_path / "vit.pt"), *out], "ViT-B-32 has GELU, ViT-B-32-quickgelu QuickGELU: the weights do not tell"),
        ([str(tmp_path / "vit.pt"), "--out", "x.pt"], "out: got 'x.pt', expected a file name that ends with"),
        (
            [str(tmp_path / "vit.pt"), *out, "--format", "slip", "--model-name", "x"],
            "model_name: got 'x', expected None",
        ),
    ):
        assert main(["import", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main(["export", str(tmp_path / "nowhere"), "--format", "hf", "--out", "x"]) == 2
    assert "run: got" in capsys.readouterr().err


@pytest.mark.system
def test_module_runs_as_a_program():
    result = subprocess.run(
        [sys.executable, "-m", "rocket_fast", "presets", "nope-nope"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("rocket-fast: preset: got 'nope-nope'")
