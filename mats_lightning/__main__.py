"""The command `lightning run X.py [arguments]`, also `python -m mats_lightning run X.py [...]`.

The file is run as `python X.py [arguments]` would run it, so a script that starts itself again,
as Lightning's DDP does for its other ranks, finds its own path and arguments in `sys.argv`.

The name `lightning` belongs to the command of the distribution lightning-sdk as well; the later
install of the two owns the file. What is not `run X.py` is therefore handed on to lightning-sdk
where it is installed.
"""

import importlib.metadata
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

USAGE = """\
usage: lightning run X.py [arguments]
       python -m mats_lightning run X.py [arguments]

Runs the Python file as its main program: sys.argv is [X.py, arguments...], and the modules
beside the file can be imported. All arguments after the file are the file's own.
Any other command goes on to lightning-sdk's `lightning`, if that is installed."""


def main() -> str | int | None:
    """Run the command line in `sys.argv`.

    Returns the exit status, as `sys.exit` takes it: what lightning-sdk's command returned; 0
    after the script or the help; 2 for a command line that names no command or no existing file.
    Exceptions and `SystemExit` of the script pass through.
    """
    match sys.argv[1:]:
        case ["run", script, *arguments] if script.endswith(".py"):
            if not Path(script).is_file():
                return _refuse(f"there is no file {script!r} in {Path.cwd()}")
            _run(script, arguments)
            return 0
        case ["run", "-h" | "--help"]:
            print(USAGE)
            return 0
    forward = _lightning_sdk()
    if forward is not None:
        return forward()
    reason = "no command given"
    match sys.argv[1:]:
        case ["-h" | "--help"]:
            print(USAGE)
            return 0
        case ["run"]:
            reason = "`run` needs the Python file to run"
        case ["run", script, *_]:
            reason = f"`run` needs a Python file, its name ending in .py, not {script!r}"
        case [command, *_]:
            reason = f"no command {command!r} here, and lightning-sdk is not installed"
    return _refuse(reason)


def _run(script: str, arguments: list[str]) -> None:
    sys.argv = [script, *arguments]
    if not sys.flags.safe_path:  # `python -P` puts no folder in front: the first entry is another's
        sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


def _lightning_sdk() -> Callable[[], str | int | None] | None:
    """The function behind lightning-sdk's command `lightning`; None where it is not installed."""
    try:
        # by distribution: among all scripts called `lightning` we would find our own
        scripts = importlib.metadata.distribution("lightning-sdk").entry_points
    except importlib.metadata.PackageNotFoundError:
        return None
    for script in scripts.select(group="console_scripts", name="lightning"):
        function: Callable[[], str | int | None] = script.load()
        return function
    return None


def _refuse(reason: str) -> int:
    print(f"lightning: {reason}\n\n{USAGE}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
