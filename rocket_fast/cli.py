"""The commands: options are the configuration's own fields, their help the fields' docstrings (parsed by tyro)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rocket_fast.config import TrainConfig, load_config, to_plain
from rocket_fast.errors import require
from rocket_fast.export import ExportFormat, Head
from rocket_fast.interop.detect import Format
from rocket_fast.launch import SlurmConfig, launch_local, launch_slurm
from rocket_fast.loaders.convert import PackConfig, pack
from rocket_fast.loaders.emoji import EmojiConfig, build_emoji
from rocket_fast.plan import TYPICAL_TOKENS
from rocket_fast.presets import overview, preset

Checkpoint = Literal["last", "best"]


def dispatch(arguments: list[str]) -> None:
    """Run the command that ``arguments`` name; raises what the command raises."""
    if arguments[:1] == ["launch"]:
        _dispatch_launch(arguments[1:])
        return
    commands: dict[str, Callable[..., Any]] = {
        "train": _train_command(arguments, _train),
        "plan": _plan_command(arguments),
        "launch": launch,
        "eval": evaluate,
        "export": export,
        "import": import_model,
        "report": report,
        "presets": presets,
        "data": data,
        "doctor": doctor,
    }
    prog = "rocket-fast"
    if arguments[:1] == ["data"]:
        commands, arguments, prog = (
            {"emoji": emoji, "check": check, "pack": pack_command, "index": index},
            arguments[1:],
            "rocket-fast data",
        )
    if arguments and arguments[0] in commands:  # by itself, so that errors name the option and the command's own help
        prog = f"{prog} {arguments[0]}"
        tyro.cli(commands[arguments[0]], args=arguments[1:], prog=prog, config=(tyro.conf.AvoidSubcommands,))
    else:
        tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog=prog, config=(tyro.conf.AvoidSubcommands,))


def _chosen_preset(arguments: list[str]) -> str:
    """The preset that the arguments name, whose fields are the command's options; else the demo."""
    chosen = "demo"
    for here, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if here == "--preset":
            chosen = following
        elif here.startswith("--preset="):
            chosen = here.removeprefix("--preset=")
    return chosen


def _train_command(arguments: list[str], act: Callable[[TrainConfig, bool], Any]) -> Callable[..., Any]:
    """``train``, with the options and defaults of the preset that the arguments name; does ``act``."""
    chosen = _chosen_preset(arguments)
    default = preset(chosen)

    def train(
        preset: str = chosen,
        resume: bool = True,
        *,
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default,
    ) -> Any:
        """Train a preset, every option of which can be changed, then evaluate; run again to continue where it stopped.

        Args:
            preset: Which recipe to start from; `rocket-fast presets` lists them.
            resume: Continue the run that the folder holds, with the same recipe; otherwise refuse to touch it. What
                does not change its result may differ: data.workers, loop.max_steps, loop.log_every, loop.track ...
            config: The recipe.
        """
        return act(config, resume)

    return train


def _plan_command(arguments: list[str]) -> Callable[..., None]:
    """``plan``, with the options and defaults of the preset that the arguments name."""
    chosen = _chosen_preset(arguments)
    default = preset(chosen)

    def plan(
        preset: str = chosen,
        gpu: str = "h100",
        gpus: int = 8,
        tokens: int = TYPICAL_TOKENS,
        samples: int | None = None,
        cores: float | None = None,
        matmul_efficiency: float | None = None,
        memory_efficiency: float | None = None,
        sweep: bool = False,
        picture: Path | None = None,
        json: Path | None = None,
        *,
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default,
    ) -> None:
        """Predict a run's speed, memory and hours on GPUs that need not be there, by a calibrated cost model.

        Args:
            preset: Which recipe to start from; `rocket-fast presets` lists them.
            gpu: a100-40, a100-80, h100, h100-pcie, h100-nvl, h200, b200, l40s or 4090.
            gpus: How many; eight share a machine.
            tokens: Tokens of a caption with both ends, on average; 77 for padded ones.
            samples: Training pairs, for the hours; by default the published size of the preset's data.
            cores: CPU cores for each GPU to decode and augment with; by default as many as it takes.
            matmul_efficiency: Part of the peak that matrix products reach, instead of the calibrated one.
            memory_efficiency: Part of the memory's bandwidth that all else reaches, likewise.
            sweep: Also predict the same global batch on 1 to 4096 GPUs.
            picture: Draw the sweep into this PNG or SVG; needs the extra report.
            json: Write all figures to this file.
            config: The recipe.
        """
        from rocket_fast.plan_report import PlanRequest, run_plan

        request = PlanRequest(
            preset=preset,
            gpu=gpu,
            gpus=gpus,
            tokens=tokens,
            samples=samples,
            cores=cores,
            matmul_efficiency=matmul_efficiency,
            memory_efficiency=memory_efficiency,
            sweep=sweep,
            picture=picture,
            json=json,
        )
        run_plan(request, config, Console())

    return plan


def _train(config: TrainConfig, resume: bool) -> None:
    from rocket_fast.trainer import train

    train(config, resume=resume)


def launch() -> None:
    """Train on many GPUs: `rocket-fast launch local -- train ...`, `rocket-fast launch slurm -- train ...`."""


def _dispatch_launch(arguments: list[str]) -> None:
    """``launch local`` or ``launch slurm``, with options up to ``--``; the train command behind it is checked here."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own, command = arguments[:end], arguments[end + 1 :]

    def config() -> TrainConfig:
        got = "nothing" if not command else command[0]
        require(command[:1] == ["train"], "launch, behind --", got, "train and its options: -- train --preset ...")
        keep = _train_command(command, lambda config, resume: config)
        return tyro.cli(keep, args=command[1:], prog="rocket-fast train", config=(tyro.conf.AvoidSubcommands,))

    def local(nproc: int | None = None, restarts: int = 0) -> None:
        """Train in several processes on this machine, by torchrun: `rocket-fast launch local -- train --preset ...`.

        Args:
            nproc: Processes; by default one for each GPU.
            restarts: How often to start all again, from the last checkpoint, after one failed.
        """
        launch_local(command[1:], config(), nproc=nproc, restarts=restarts)

    def slurm(job: Annotated[SlurmConfig, tyro.conf.arg(name="")] = SlurmConfig()) -> None:  # noqa: B008 - frozen
        """Train as a SLURM job, one process for each GPU: `rocket-fast launch slurm --nodes 2 -- train --preset ...`.

        Args:
            job: What to ask SLURM for.
        """
        print(launch_slurm(command[1:], config(), job))

    tyro.extras.subcommand_cli_from_dict({"local": local, "slurm": slurm}, args=own, prog="rocket-fast launch")


def evaluate(run: tyro.conf.Positional[Path], checkpoint: Checkpoint = "last") -> None:
    """Evaluate a run's checkpoint on the sets of its configuration; print the table, write eval.json and the pictures.

    Args:
        run: The run's folder, such as runs/demo.
        checkpoint: The last one, or the one that scored best in training.
    """
    from rocket_fast.evaluation import result_table
    from rocket_fast.trainer import evaluate_run

    config = load_config(run)
    Console().print(result_table(evaluate_run(run, checkpoint), config.eval))


def report(run: tyro.conf.Positional[Path], out: Path | None = None) -> None:
    """Write one HTML page about a run: curves, speed, skipped data, evaluation with its pictures, configuration.

    Args:
        run: The run's folder, such as runs/demo; it may still be training.
        out: The file to write; by default report.html in the run's folder.
    """
    from rocket_fast.report import write_report

    Console().print(f"wrote {write_report(run, out)}", highlight=False, soft_wrap=True, markup=False)


def export(
    run: tyro.conf.Positional[Path],
    format: ExportFormat,
    out: Path,
    head: Head | None = None,
    z_weight: float | None = None,
    checkpoint: Checkpoint = "last",
) -> None:
    """Write a model for other programs: open_clip, transformers (hf), ONNX, torch.export, or safetensors of our own.

    Args:
        run: A run's folder, such as runs/demo, or a file of `rocket-fast import`.
        format: open_clip and hf hold one linear head (z) of models that their classes have; the others hold all.
        out: The folder to write into.
        head: Which embedding: z, h, or both side by side, whose cosine is the ensemble's score. By default both, which
            is z in a model without head h.
        z_weight: Weight of head z in both; by default the run's eval.z_weight.
        checkpoint: The run's last one, or the one that scored best in training.
    """
    from rocket_fast.export import export as write
    from rocket_fast.export import load_model
    from rocket_fast.trainer import saved_run

    require(run.exists(), "run", str(run), "a run's folder, or a file of rocket-fast import")
    saved = (saved_run(run, checkpoint) if run.is_dir() else load_model(run)).using(head, z_weight)
    for path in write(saved, out, format):
        Console().print(f"wrote {path}", highlight=False, soft_wrap=True, markup=False)


def import_model(
    checkpoint: tyro.conf.Positional[Path],
    out: Path,
    format: Format = "auto",
    model_name: str | None = None,
) -> None:
    """Turn another project's model into safetensors that `rocket-fast export` reads: clip-rocket, SLIP, open_clip, ...

    Args:
        checkpoint: A file (.pt, .safetensors), or a folder of open_clip or transformers. No code in it is run.
        out: The .safetensors file to write. Its model takes pictures normalised as ImageNet's, whatever the original
            took.
        format: Whose it is; auto tells by the contents.
        model_name: For a file of open_clip's: the model's name there, such as ViT-B-32-quickgelu.
    """
    from rocket_fast.export import SavedModel, image_size_of, save_model
    from rocket_fast.interop.detect import import_checkpoint

    require(out.suffix == ".safetensors", "out", str(out), "a file name that ends with .safetensors")
    found = import_checkpoint(checkpoint, format=format, model_name=model_name).for_imagenet()
    size = image_size_of(found.config)
    save_model(SavedModel(model=found.build(), image_size=size, arguments=found.arguments), out)
    count = sum(tensor.numel() for tensor in found.state.values()) / 1e6
    vision = type(found.config.vision).__name__.removesuffix("Config")
    made = f"wrote {out}: {vision} for {size} px, {count:.1f} M numbers, embeddings of {found.config.embed_dim}"
    for line in (*found.notes, made):
        Console().print(line, highlight=False, soft_wrap=True, markup=False)


def presets(name: tyro.conf.Positional[str | None] = None) -> None:
    """List the presets, or print one: the resolved recipe, parameters and FLOPs.

    Args:
        name: A preset's name.
    """
    console = Console()
    if name is None:
        table = Table(title="rocket-fast presets NAME prints one in full")
        table.add_column("preset", overflow="fold")
        table.add_column("what it is")
        for names, meaning in overview():
            table.add_row(names, meaning)
        console.print(table)
        return
    config = preset(name)
    console.print_json(data=to_plain(config))
    console.print(_cost_table(config))


def _cost_table(config: TrainConfig) -> Table:
    from rocket_fast.plan import cost

    figures = cost(config)
    table = Table(title=f"{config.name}: cost", show_header=False)
    towers = f"image {figures.image_parameters / 1e6:.1f}, text {figures.text_parameters / 1e6:.1f}"
    rows = {
        "parameters": f"{figures.parameters / 1e6:.1f} M ({towers}, heads {figures.head_parameters / 1e6:.1f})",
        "views per sample": str(figures.views),
        "image FLOPs per sample": f"{figures.image_flops / 1e9:.2f} G forward, all views",
        "text FLOPs per sample": f"{figures.text_flops / 1e9:.2f} G forward at {TYPICAL_TOKENS} tokens, "
        f"{figures.text_flops_full / 1e9:.2f} G at full length",
        "head FLOPs per sample": f"{figures.head_flops / 1e9:.3f} G forward, all views",
    }
    training = f"{figures.training_flops / 1e9:.2f} G (3 x forward)"
    if figures.momentum_parameters:
        rows["averaged encoder"] = f"{figures.momentum_parameters / 1e6:.1f} M parameters, not trained"
        rows["its FLOPs per sample"] = f"{figures.momentum_flops / 1e9:.2f} G forward, all views"
        training = f"{figures.training_flops / 1e9:.2f} G (3 x forward, 1 x averaged encoder's)"
    rows["training FLOPs per sample"] = training
    for subject, figure in rows.items():
        table.add_row(subject, figure)
    return table


def data() -> None:
    """Build, check, pack or index data: `rocket-fast data emoji`, `data check`, `data pack`, `data index`."""


def emoji(config: Annotated[EmojiConfig, tyro.conf.arg(name="")] = EmojiConfig()) -> None:  # noqa: B008 - frozen
    """Fetch the demo's emoji drawings, render them, write training and test shards and a contact sheet."""
    build_emoji(config)


def check(
    shards: tyro.conf.Positional[tuple[str, ...]],
    captions: Literal["txt", "several"] = "txt",
    workers: int = 2,
    picture: Path | None = None,
) -> None:
    """Read every sample of the given data as training would; count what would be skipped, and why.

    Args:
        shards: What data.train takes: tars, tables, folders, or patterns, such as 'data/emoji/train-*.tar'.
        captions: Where captions are read: the .txt members, or the lists in the .json members.
        workers: Threads that read and decode.
        picture: Also draw histograms of sizes and caption lengths and a few samples, into this PNG.
    """
    from rocket_fast.loaders.check import check_shards
    from rocket_fast.loaders.check_picture import draw_check, quantile

    require(len(shards) > 0, "shards", shards, "at least one tar file or pattern")
    with _progress("check") as advance:
        report = check_shards(shards, captions=captions, workers=workers, advance=advance)
    table = Table("", "samples", "for example")
    sizes = "" if report.pixels is None else f"{report.pixels[0]:,} to {report.pixels[1]:,} pixels"
    table.add_row("usable", f"{report.usable:,}", sizes)
    for reason, count in report.skipped.most_common():
        table.add_row(reason, f"{count:,}", ", ".join(report.examples.get(reason, [])))
    for name, values in (("shorter side", report.sides), ("words a caption", report.words)):
        if values:
            low, middle, high = (quantile(values, part) for part in (0.05, 0.5, 0.95))
            table.add_row(name, "", f"{middle:,}; {low:,} to {high:,} in nine of ten")
    Console().print(table)
    if picture is not None:
        draw_check(report, picture, ", ".join(shards))
        Console().print(f"histograms and samples: {picture}")


def pack_command(
    sources: tyro.conf.Positional[tuple[str, ...]], config: Annotated[PackConfig, tyro.conf.arg(name="")]
) -> None:
    """Write any data as numbered tars, or FFCV's .beton files; the same command continues after a kill.

    Args:
        sources: What data.train takes: tars, tables, folders, or patterns.
        config: Where and how.
    """
    require(len(sources) > 0, "sources", sources, "at least one file, folder or pattern")
    with _progress("pack") as advance:
        report = pack(sources, config, advance=advance)
    table = Table("", "samples")
    table.add_row(f"packed into {report.shards:,} {config.format}s ({report.kept:,} were there)", f"{report.samples:,}")
    for reason, count in report.skipped.most_common():
        table.add_row(reason, f"{count:,}")
    Console().print(table)


def index(shards: tyro.conf.Positional[tuple[str, ...]], out: Path | None = None, workers: int = 2) -> None:
    """Write an index file beside each tar, so that runs open thousands of them at once; those of unchanged tars stay.

    Args:
        shards: What data.train takes. Only tars have an index; other data is left alone.
        out: Folder for the index files, where the tars' own cannot be written; name it behind the pattern in training:
            'data/*.tar?index=FOLDER'.
        workers: Threads that read.
    """
    from rocket_fast.loaders.shards import expand_patterns
    from rocket_fast.loaders.sources.tar_index import index_tars

    require(len(shards) > 0, "shards", shards, "at least one tar file or pattern")
    tars = [each.path for each in expand_patterns(shards) if each.path.suffix.lower() == ".tar"]
    require(len(tars) > 0, "shards", shards, "tars: nothing else has an index")
    with _progress("index") as advance:
        report = index_tars(tars, folder=out, workers=workers, advance=advance)
    where = "beside the tars" if out is None else f"in {out}: train on 'PATTERN?index={out}'"
    line = f"{report.written:,} index files written, {report.kept:,} kept, {report.samples:,} samples, {where}"
    Console().print(line, highlight=False, soft_wrap=True, markup=False)


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar, and the function that moves it to so many done of so many."""
    with Progress(TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(name)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def doctor() -> None:
    """Say what this machine has, what a run would choose on it, and what is not installed."""
    from rocket_fast.doctor import doctor_table

    Console().print(doctor_table())
