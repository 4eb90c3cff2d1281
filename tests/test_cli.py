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


def test_help_lists_commands_and_every_option_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for command in ("train", "eval", "presets", "data", "doctor"):
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
    for command in (["data"], ["data", "emoji"], ["data", "check"], ["eval"], ["presets"], ["doctor"]):
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
    assert "optim.lr: got -1.0, expected a positive number" in error


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


@pytest.mark.system
def test_module_runs_as_a_program():
    result = subprocess.run(
        [sys.executable, "-m", "rocket_fast", "presets", "nope-nope"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("rocket-fast: preset: got 'nope-nope'")
