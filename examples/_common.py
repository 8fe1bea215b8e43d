"""What the scripts share: options of their command lines, and the memory that these ask for, trained or not."""

import argparse
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ahn_layers import Compressor, load_adapter, retrofit
from ahn_layers.hub import download

WINDOW, SINKS = 1920, 128
"""The window of a memory that comes without a description of its own."""


class Refused(SystemExit):
    """Ends a script with exit code 2 and one line on standard error, as argparse ends it for a wrong option."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 2
        print(message, file=sys.stderr)


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows descriptions as they are written, and the default of each option that its help does not name."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if "default" in text or default in (None, [], argparse.SUPPRESS) or isinstance(default, bool):
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{text} (default: {shown})".replace("%", "%%")


@contextmanager
def user_errors(program: str) -> Iterator[None]:
    """Within this context, an error that a user can put right ends the script, without a traceback."""
    try:
        yield
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise Refused(f"{program}: {' '.join(str(error).split())}") from None


def compressor_names() -> list[str]:
    """The compressors that a script can make, without the bases that they share."""
    return sorted(name for name, cls in Compressor.by_name.items() if not inspect.isabstract(cls))


def add_memory_options(parser: argparse.ArgumentParser, window: int = WINDOW, sinks: int = SINKS) -> None:
    """The options of ``give_memory``."""
    add = parser.add_argument
    add("--window", type=positive, help=f"tokens kept without loss (default: the adapter's, else {window})")
    add("--sinks", type=count, help=f"first tokens, always kept (default: the adapter's, else {sinks})")
    add("--compressor", choices=compressor_names(), help="default: the adapter's, else GatedDeltaNet")


def positive(text: str) -> int:
    """A whole number above zero, for the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def count(text: str) -> int:
    """A whole number, for the command line."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, not negative")
    return int(text)


def device(text: str) -> str:
    """A device that is there, for the command line."""
    try:
        asked = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected cpu, cuda, cuda:1, ...") from None
    if asked.type == "cuda" and not (torch.cuda.is_available() and (asked.index or 0) < torch.cuda.device_count()):
        raise argparse.ArgumentTypeError(f"{text!r}: this machine has no such GPU that PyTorch can use")
    return text


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--dtype``: a GPU in bfloat16 if there is one, else the CPU in float32."""
    gpu = torch.cuda.is_available()
    parser.add_argument(
        "--device", type=device, default="cuda" if gpu else "cpu", help="where it runs: cpu, cuda, cuda:1, ..."
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16" if gpu else "float32",
        choices=["float32", "bfloat16", "float16"],
        help="precision of the model",
    )


def given(parser: argparse.ArgumentParser, options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Those of the options that are not as they are by default."""
    return [f"--{u.replace('_', '-')}" for u in names if getattr(options, u) != parser.get_default(u)]


def number(most: float) -> Callable[[str], float]:
    """A number from 0 to ``most``, for the command line."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 to {most:g}")
        return value

    return convert


def refuse_model(model: str | None) -> None:
    """Raise a ValueError if a model is named beside ``--random-weights``."""
    if model is not None:
        raise ValueError(f"--model {model}: --random-weights makes a model of its own. Leave one of them out.")


def find_adapter(adapter: str | Path | None, option: str = "--adapter") -> Path | None:
    """Where an adapter lies on this machine; a hub repository is downloaded. None for None.

    Args:
        adapter: folder, file or hub id.
        option: what it was given by, for messages.

    Raises:
        FileNotFoundError: if there is no such folder, file or repository.
    """
    if adapter is None or Path(adapter).exists():
        return None if adapter is None else Path(adapter)
    try:
        return download(str(adapter))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{option} {error}") from None


def give_memory(
    model: Any,
    adapter: Path | None,
    *,
    window: int | None = None,
    sinks: int | None = None,
    compressor: str | None = None,
    default: tuple[int, int] = (WINDOW, SINKS),
    **options: Any,
) -> None:
    """Retrofit a model and load a trained memory into it.

    An adapter of this library says how it wants to be used, so ``load_adapter`` does both. Released files hold weights
    alone: they go into a model that is retrofitted as the arguments say.

    Args:
        model: a causal language model of transformers.
        adapter: as ``find_adapter`` found it; None for a memory that is not trained.
        window: window size, None for the adapter's own.
        sinks: number of sinks, None for the adapter's own.
        compressor: name of its class, None for the adapter's own.
        default: window size and sinks where there is no adapter that has its own.
        **options: further arguments of ``retrofit``, None for the adapter's own.

    Raises:
        ValueError: if the adapter does not fit the model, or is not what the arguments ask for.
    """
    asked = {name: value for name, value in options.items() if value is not None}
    if adapter is not None and describes_itself(adapter):
        load_adapter(model, adapter, window_size=window, num_sinks=sinks)
        _compare(model, asked if compressor is None else {"compressor": compressor, **asked}, adapter)
        return
    sizes = {
        "window_size": default[0] if window is None else window,
        "num_sinks": default[1] if sinks is None else sinks,
    }
    retrofit(model, Compressor.by_name[compressor or "GatedDeltaNet"], **sizes, **asked)
    if adapter is not None:
        load_adapter(model, adapter)


def describes_itself(adapter: Path) -> bool:
    """Whether this is an adapter of the library, and not released weights."""
    name = "adapter.safetensors"
    return adapter.name == name if adapter.is_file() else (adapter / name).exists()


def _compare(model: Any, asked: dict[str, Any], adapter: Path) -> None:
    record = model.hippocampus
    found = {"compressor": record.compressor, "memory_positions": record.memory_positions, **record.options}
    for name, value in asked.items():
        if found.get(name) != value:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} {value}: the memory in {adapter} was trained with {name}={found.get(name)!r}. "
                f"Leave {flag} out."
            )
