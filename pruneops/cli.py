"""`pruneops info` and `pruneops demo`.

Errors are one line on stderr and exit status 2; an interrupt is one line and 130.
"""

import argparse
import json
import os
import platform
import sys
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from . import __version__, backends, ops
from .backends import AUTO, BACKENDS, TRITON_FIRST, BackendUnavailable
from .demo import DemoError
from .methods.base import METHODS


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments of the command line; those of the process by default.

    Returns
    -------
    int
        Exit status.
    """
    arguments = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return arguments.command(arguments)
    except (DemoError, BackendUnavailable) as error:
        return _print_error(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _print_error("interrupted", 130)
    except BrokenPipeError:  # the reader of the output closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def info() -> dict[str, Any]:
    """What is built, what can run here and why the rest cannot, as a JSON-serialisable dictionary."""
    record = backends.build_record()
    native = backends.native_problem()
    capability = None
    if native is None:
        from . import _C

        capability = _C.cpu_capability()
    try:
        import triton
    except ImportError:
        triton = None
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton and triton.__version__,
        "native": {
            "cpu": {"instruction_set": capability, "problem": native},
            "cuda": {"archs": record.get("archs", []), "problem": backends.cuda_problem()},
        },
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "operators": {name: list(has) for name, has in sorted(ops.OPERATORS.items())},
        "backends": {device: _backends_of(device) for device in AUTO},
        "triton_first": sorted(map(list, TRITON_FIRST)),
    }


def _info(arguments):
    record = info()
    print(json.dumps(record, indent=1) if arguments.json else _describe(record))
    return 0


def _demo(arguments):
    try:
        from .demo.run import report, run
    except ModuleNotFoundError as error:
        raise DemoError(f'the demo needs {error.name}: pip install "pruneops[demo]"') from None

    record = run(
        arguments.image,
        question=arguments.question,
        method=arguments.method,
        keep=arguments.keep,
        out=arguments.out,
        save=arguments.save,
        seed=arguments.seed,
        device=arguments.device,
        backend_name=arguments.backend,
    )
    print(json.dumps(record, indent=1) if arguments.json else report(record))
    return 0


def _gpu(index):
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "arch": f"{properties.major}{properties.minor}",
        "gib": round(properties.total_memory / 2**30, 1),
    }


def _backends_of(device):
    """Which backend `auto` takes on a device, and for each backend None or why it cannot run there."""
    problems = {name: backends.why_not(name, device) for name in BACKENDS}
    if device == "cuda" and not torch.cuda.is_available():
        absent = "this PyTorch is a CPU build" if torch.version.cuda is None else "PyTorch sees no GPU"
        problems = {name: problem or f"no CUDA tensors here: {absent}" for name, problem in problems.items()}
    auto = next((name for name in AUTO[device] if problems[name] is None), None)
    return {"auto": auto, "problems": problems}


def _describe(record):
    cpu, cuda = record["native"]["cpu"], record["native"]["cuda"]
    archs = f"built for {', '.join(f'sm_{arch}' for arch in cuda['archs'])}" if cuda["archs"] else "not built"
    gpus = [f"{gpu['name']} (sm_{gpu['arch']}, {gpu['gib']} GiB)" for gpu in record["gpus"]]
    lines = [
        f"pruneops        {record['version']}",
        f"python          {record['python']}",
        f"torch           {record['torch']}",
        f"triton          {record['triton'] or 'not installed'}",
        f"C++ kernels     {'not usable' if cpu['problem'] else 'built, run here with ' + cpu['instruction_set']}",
        f"CUDA kernels    {archs}",
        f"GPUs            {', '.join(gpus) or 'none seen'}",
        *textwrap.wrap(
            ", ".join(record["operators"]), 110, initial_indent="operators       ", subsequent_indent=" " * 16
        ),
        "",
        f"{'every operator on':<20}" + "".join(f"{name:<11}" for name in BACKENDS),
    ]
    for device, entry in record["backends"].items():
        problems = entry["problems"]
        cells = ["no" if problems[name] else "auto" if name == entry["auto"] else "yes" for name in BACKENDS]
        lines.append(f"  {device.upper() + ' tensors':<18}" + "".join(f"{cell:<11}" for cell in cells))
        lines += [f"    {name}: {_sentence(problem)}" for name, problem in problems.items() if problem]
    for name in BACKENDS:
        lacking = ", ".join(operator for operator, has in record["operators"].items() if name not in has)
        lines += ["", *textwrap.wrap(f"without {name}: {lacking}", 110)] if lacking else []
    lines += ["", "auto: used unless `with pruneops.backend(...)` forces another."]
    first = ", ".join(f"{operator} ({shapes})" for operator, shapes in record["triton_first"])
    lines += textwrap.wrap(f"On CUDA, where both can run, Triton is preferred for {first}.", 110)
    return "\n".join(line.rstrip() for line in lines)


def _sentence(reason):
    return f"{reason[0].upper()}{reason[1:]}" + ("" if reason.endswith(".") else ".")


class _Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser():
    parser = _Parser(prog="pruneops", description="Fused operators for visual-token pruning.")
    parser.add_argument("--version", action="version", version=f"pruneops {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("info", help="what is built, what can run here, and why the rest cannot")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(command=_info)

    command = commands.add_parser(
        "demo",
        help="ask a small LLaVA about a picture, unpruned and pruned, and draw the kept tokens",
        description="Ask the small LLaVA that comes along about a picture, with all 256 visual tokens and pruned; "
        "compare answers, tokens, KV cache and times, and draw which tokens were kept.",
    )
    add = command.add_argument
    add("--image", metavar="PATH", help="photograph (default: a test scene with coloured digits, answers known)")
    add("--question", metavar="TEXT", help='like "which digit is red ?" (default: one of every kind)')
    names = ", ".join(METHODS)
    add("--method", choices=tuple(METHODS), default="todre", metavar="NAME", help=f"todre (default); any of {names}")
    add("--keep", type=_keep, metavar="K", help="share of the tokens, like 0.1 (default), or their number, like 26")
    add("--out", default="pruneops-demo.png", metavar="PATH", help="picture, or its directory (default: %(default)s)")
    add("--save", metavar="PATH", help="write answers and measurements as JSON")
    add("--json", action="store_true", help="print JSON, not tables")
    add(
        "--seed", type=_seed, default=0, help="of the scene, the choice of questions and the method random (default: 0)"
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
    add(
        "--backend", choices=("auto", *BACKENDS), default="auto", help="implementation of the operators (default: auto)"
    )
    command.set_defaults(command=_demo)
    return parser


def _keep(text):
    """A number of tokens ("288") or a fraction of them ("0.1", "1.0")."""
    try:
        value = int(text)
    except ValueError:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is neither a number of tokens nor a fraction") from None
    if not (value >= 1 if isinstance(value, int) else 0 < value <= 1):
        raise argparse.ArgumentTypeError(f"{text} is neither a number of tokens >= 1 nor a fraction in (0, 1]")
    return value


def _seed(text):
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer from 0 to 2^63 - 1")
    return int(text)


def _show_warning(message, *_, **__):
    _print_error(message, 0)


def _print_error(message, status):
    """One line on stderr; returns the exit status."""
    text = str(message).removeprefix("pruneops: ")
    print(f"pruneops: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
