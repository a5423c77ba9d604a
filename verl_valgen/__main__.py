"""`python -m verl_valgen page DIR` and `python -m verl_valgen show DIR`: a folder of samples, to look at."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from verl_valgen.text import describe, printable
from verl_valgen.viewing.folder import Folder, NoSamples, find_folder

_DIRECTORY = "the folder of the samples (generations, old-1, ...), or the run's folder that has generations/"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command, and returns the status that it ends with: 2, after one line, where there is nothing to show."""
    args = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # under an ASCII locale a letter must not cost the rest
    try:
        args.command(args)
        sys.stdout.flush()
    except NoSamples as error:
        return _refuse(printable(str(error)))
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the end
    except OSError as error:
        return _refuse(describe(error))
    return 0


def _page(args: argparse.Namespace) -> None:
    from verl_valgen.viewing.page_files import COMPARE_FILE, write_whole
    from verl_valgen.viewing.writing import make_page, one_file

    folders = [_open(path) for path in (args.directory, args.compare) if path is not None]
    if args.one_file is None and args.compare is None:
        path = make_page(folders[0])
    else:
        path = args.one_file or folders[0].directory / COMPARE_FILE
        write_whole(path, one_file(*folders))
    print(path)


def _show(args: argparse.Namespace) -> None:
    from verl_valgen.viewing.terminal import show

    show(_open(args.directory), prompt=args.prompt, strategy=args.strategy, step=args.step)


def _open(path: Path) -> Folder:
    return Folder(find_folder(path), lambda problem: print(printable(problem), file=sys.stderr))


def _refuse(reason: str) -> int:
    print(f"verl_valgen: {reason}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m verl_valgen", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="page|show")

    page = commands.add_parser("page", help="make the page for the browser, and print where it is")
    page.add_argument("directory", metavar="DIR", type=Path, help=_DIRECTORY)
    page.add_argument("--one-file", metavar="FILE", type=Path, help="everything in this one file, to mail it")
    page.add_argument(
        "--compare", metavar="DIR2", type=Path, help="another run beside it; one file, DIR/compare.html by default"
    )
    page.set_defaults(command=_page)

    show = commands.add_parser("show", help="print prompts and their answers, step by step")
    show.add_argument("directory", metavar="DIR", type=Path, help=_DIRECTORY)
    show.add_argument("--prompt", metavar="I", type=int, help="one prompt, counted from 1 as on the console")
    show.add_argument("--strategy", metavar="NAME", help="answers of one strategy")
    show.add_argument("--step", metavar="N", type=int, help="answers of one step")
    show.set_defaults(command=_show)
    return parser


if __name__ == "__main__":
    sys.exit(main())
