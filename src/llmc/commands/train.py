"""Train GPT-2.

Without arguments it trains a small model on the language reference and the docstrings that every Python carries, in about two minutes on
two cores.
llm.c's short flags have the same meaning as in llm.c. Flags win over --config FILE, and that wins over the defaults.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmc.arguments import Parser
from llmc.distributed.launcher import run_processes
from llmc.distributed.place import must_launch
from llmc.distributed.world import World, open_world
from llmc.system.memory import available_host_memory
from llmc.training.settings import SETTINGS, Setting, TrainConfig, load_toml, of_run

_LEAST_MEMORY = 40_000_000  # bytes that a rank has to itself when it has imported llmc and MPI


class _HelpOrHellaSwag(argparse.Action):
    """Shows the help for -h alone, as any program does. With a value -h is llm.c's flag for HellaSwag."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if values is None:
            parser.print_help()
            parser.exit()
        setattr(namespace, self.dest, values)


def zero_or_one(text: str) -> bool:
    """Parse the value of one of llm.c's flags that are on or off.

    Args:
        text: "0" or "1".

    Raises:
        argparse.ArgumentTypeError: if it is anything else.
    """
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"'{text}', expected 0 or 1")
    return text == "1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser: --config, and a flag for each field of TrainConfig."""
    parser.usage = "%(prog)s [SETTING ...]"
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file with settings by name, like config.toml in a run directory"
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, setting in SETTINGS.items():
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        _add_setting(groups[setting.group], name, setting)


def _add_setting(group: argparse._ArgumentGroup, name: str, setting: Setting) -> None:
    """Add a setting's long flag, and llm.c's short one."""
    long, short = "--" + name.replace("_", "-"), setting.flag
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": setting.help.replace("%", "%%")}
    if setting.kind is bool:
        # llm.c's flags of this kind take 0 or 1, and are arguments of their own.
        if name == "resume":
            group.add_argument(long, nargs="?", const=True, metavar="RUN", **options)
        else:
            group.add_argument(long, action=argparse.BooleanOptionalAction, **options)
        if short == "-h":
            options["help"] = "alone: this help; with 1: HellaSwag"
            group.add_argument(short, nargs="?", type=zero_or_one, metavar="1", action=_HelpOrHellaSwag, **options)
        elif short:
            options["help"] = "the same, by llm.c's name"
            group.add_argument(short, type=zero_or_one, metavar="0|1", **options)
        return
    if setting.many:
        options.update(nargs="+", action="extend")  # given again, it adds
    if setting.choices:
        options["choices"] = setting.choices
    else:
        options["metavar"] = {int: "N", float: "X", str: "TEXT"}[setting.kind]
    group.add_argument(*[long, short][: 2 if short else 1], type=setting.kind, **options)


def settings_from(args: argparse.Namespace, world: World | None = None) -> TrainConfig:
    """Collect the settings of a run. Later sources win: defaults, config.toml of a run to resume, --config's file, flags.

    Args:
        args: what a parser with this module's arguments returned.
        world: the ranks, which all call this: rank 0 alone must see the run directory.

    Returns:
        The settings as given.

    Raises:
        FileNotFoundError: if a file of settings is not there.
        ValueError: if a setting is wrong, or --resume is given without a run directory.
    """
    flags = _flags(args)
    values: dict[str, Any] = {}
    if isinstance(run := flags.get("resume"), str):
        if world is None or world.leads:
            values.update(_settings_of_run(Path(run)))
        if world is not None:
            values = world.share_value(values)
        flags.update(resume=True, output_dir=run)
    if args.config is not None:
        values.update(load_toml(args.config))
    values.update(flags)
    config = TrainConfig(**values)
    if config.resume and config.output_dir is None:
        raise ValueError("--resume needs the run directory: --resume RUN, or --output-dir RUN --resume")
    return config


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    return {k: v for k, v in vars(args).items() if k in SETTINGS}


def _settings_of_run(run: Path) -> dict[str, Any]:
    path = run / "config.toml"
    if not path.is_file():
        raise FileNotFoundError(f"'{run}' is not a run directory: it has no config.toml")
    return of_run(load_toml(path))  # older ones have more


def _how_to_meet(args: argparse.Namespace) -> TrainConfig:
    """Return the settings by which ranks meet, which comes before all else: what is wrong with a rank's others, all then hear."""
    values = {**({} if args.config is None else load_toml(args.config)), **_flags(args)}
    return TrainConfig(**{k: v for k, v in values.items() if SETTINGS[k].group == "processes"})


def _needs_run_directory(config: TrainConfig) -> bool:
    return config.output_dir is None and config.model is None


def _new_run_directory() -> str:
    name = time.strftime("runs/%Y%m%d-%H%M%S")
    path, n = Path(name), 1
    while path.exists():
        n += 1
        path = Path(f"{name}-{n}")
    return path.as_posix()


def run(args: argparse.Namespace) -> int:
    """Train, or start the processes that do; return the exit code: 0, or 128 + n if signal n stopped the run."""
    meeting = _how_to_meet(args)
    if must_launch(os.environ, meeting):
        return _launch(args.argv, settings_from(args))
    from llmc.training.trainer import Trainer

    world = open_world(meeting)
    with world.failure_told():
        config = settings_from(args, world)
    new = _new_run_directory() if _needs_run_directory(config) and world.leads else None
    config = config.replace(output_dir=world.share_value(new or config.output_dir or None))  # rank 0's
    try:
        trainer = Trainer(config)
    except BaseException:
        if new:
            shutil.rmtree(new, ignore_errors=True)  # nobody asked for it by name, and nothing has been trained
        raise
    result = trainer.fit(pass_on_signal=False)  # other ranks and the exit code come first
    world.barrier()
    world.close()
    return 128 + result.stopped_by if result.stopped_by else 0


def _launch(argv: Sequence[str], config: TrainConfig) -> int:
    """Start the run's processes, and begin anew if they end badly."""
    from llmc.checkpoint import finished_steps

    need, free = config.processes * _LEAST_MEMORY, available_host_memory()
    if need > free:
        raise MemoryError(
            f"{config.processes} processes take at least {need / 1e9:.1f} GB before they train, {free / 1e9:.1f} GB are free"
        )
    if "-" in (*config.data, *config.val_data) and not config.resume:  # a run that is resumed has the tokens
        raise ValueError(
            "the standard input, '-', cannot be shared by processes: tokenise it first, by `llmc data text -`"
        )
    if _needs_run_directory(config):
        config = config.replace(output_dir=_new_run_directory())
    every = [*argv, "--max-restarts", "0"]
    if config.output_dir is not None:
        every += ["--output-dir", config.output_dir]  # the same for all, and after a restart

    def again() -> list[str]:
        saved = config.output_dir is not None and finished_steps(config.output_dir)
        return [*every, "--resume"] if saved and not config.resume else every

    return run_processes(every, config.processes, config.max_restarts, again=again)


def parse(argv: Sequence[str]) -> TrainConfig:
    """Return the settings that a command line means. A run of the small model that names no output_dir gets a new one under runs/.

    Args:
        argv: the arguments of `llmc train`.

    Raises:
        SystemExit: with code 2, if an argument is unknown.
        FileNotFoundError, ValueError: as of settings_from().
    """
    parser = Parser(add_help=False)
    add_arguments(parser)
    config = settings_from(parser.parse_args(list(argv)))
    return config.replace(output_dir=_new_run_directory()) if _needs_run_directory(config) else config
