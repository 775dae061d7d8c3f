"""The command, run as a user does: in a process of its own, from a folder of the user's."""

import json
import os
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path

import pytest

from mats_lightning.__main__ import main

ROOT = Path(__file__).parents[1]
AS_MODULE = ("-m", "mats_lightning")
AS_SCRIPT = ("-c", "import sys; from mats_lightning.__main__ import main; sys.exit(main())")

# what the script sees, next to what `python X.py` shows it
REPORT = """
import json, sys
import sibling
print(json.dumps({
    "name": __name__,
    "file": __file__,
    "argv": sys.argv,
    "first folder": sys.path[0],
    "spec": repr(__spec__),
    "main": sys.modules["__main__"].__dict__ is globals(),
    "sibling": sibling.VALUE,
}))
"""


def command(
    *arguments: str, cwd: Path, launcher: tuple[str, ...] = AS_MODULE, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    folders = [str(ROOT)] if path is None else [str(ROOT), str(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    return subprocess.run(
        [sys.executable, *launcher, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "report.py").write_text(REPORT)
    (folder / "sibling.py").write_text("VALUE = 42\n")
    return folder


@pytest.fixture
def lightning_sdk(tmp_path: Path) -> Path:
    """A stand-in for lightning-sdk, as pip would lay it out."""
    folder = tmp_path / "site"
    information = folder / "lightning_sdk-2026.1.1.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: lightning_sdk\nVersion: 2026.1.1\n"
    )
    (information / "entry_points.txt").write_text(
        "[console_scripts]\nlightning-sdk = fake_sdk:other\nlightning = fake_sdk:main\n"
    )
    (folder / "fake_sdk.py").write_text(
        "import sys\n\ndef main():\n    print('sdk', *sys.argv[1:])\n    return 7\n"
    )
    return folder


@pytest.mark.parametrize("launcher", [AS_MODULE, AS_SCRIPT], ids=["module", "script"])
def test_script_sees_what_python_shows_it(scripts: Path, launcher: tuple[str, ...]) -> None:
    arguments = ["scripts/report.py", "--model.iterations", "5", "--help"]
    ours = command("run", *arguments, cwd=scripts.parent, launcher=launcher)
    pythons = command(*arguments, cwd=scripts.parent, launcher=())
    assert ours.returncode == 0, ours.stderr
    seen = json.loads(ours.stdout)
    assert seen["name"] == "__main__"
    assert seen["argv"] == arguments
    assert seen["sibling"] == 42
    expected = json.loads(pythons.stdout)
    expected["file"] = seen["file"]  # python makes it absolute
    assert seen == expected


@pytest.mark.parametrize("line, code", [("sys.exit(3)", 3), ("1 / 0", 1), ("sys.exit('no')", 1)])
def test_exit_codes(tmp_path: Path, line: str, code: int) -> None:
    (tmp_path / "ends.py").write_text(f"import sys\n{line}\n")
    ended = command("run", "ends.py", cwd=tmp_path)
    assert ended.returncode == code
    assert ("ZeroDivisionError" in ended.stderr) == (line == "1 / 0")


def test_missing_file_is_named(tmp_path: Path) -> None:
    ended = command("run", "recipes/merg.py", cwd=tmp_path)
    assert ended.returncode == 2
    assert f"no file 'recipes/merg.py' in {tmp_path}" in ended.stderr
    assert ended.stdout == ""


@pytest.fixture
def without_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(name: str) -> Distribution:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", not_found)


@pytest.mark.usefixtures("without_sdk")
@pytest.mark.parametrize(
    "arguments, reason",
    [
        ([], "no command given"),
        (["run"], "needs the Python file"),
        (["run", "merge"], "not 'merge'"),
        (["studio", "list"], "no command 'studio' here, and lightning-sdk is not installed"),
    ],
    ids=["none", "run", "no .py", "of the sdk"],
)
def test_other_commands_are_refused_without_lightning_sdk(
    arguments: list[str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["lightning", *arguments])
    assert main() == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert reason in printed.err
    assert "usage: lightning run X.py" in printed.err


@pytest.mark.usefixtures("without_sdk")
@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["run", "--help"]], ids=" ".join)
def test_help(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["lightning", *arguments])
    assert main() == 0
    assert capsys.readouterr().out.startswith("usage: lightning run X.py")


def test_other_commands_go_on_to_lightning_sdk(tmp_path: Path, lightning_sdk: Path) -> None:
    ended = command("studio", "list", cwd=tmp_path, path=lightning_sdk)
    assert (ended.returncode, ended.stdout) == (7, "sdk studio list\n")


def test_run_stays_ours_beside_lightning_sdk(scripts: Path, lightning_sdk: Path) -> None:
    ended = command("run", "report.py", cwd=scripts, path=lightning_sdk)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["argv"] == ["report.py"]


@pytest.mark.slow
def test_ranks_that_ddp_relaunches_run_the_same_script(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(
        "import sys\n"
        "import lightning as L\n"
        "import torch\n"
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "trainer = L.Trainer(accelerator='cpu', strategy='ddp', devices=2, max_steps=1,\n"
        "                    logger=False, enable_checkpointing=False,\n"
        "                    enable_progress_bar=False, enable_model_summary=False,\n"
        "                    limit_val_batches=0)\n"
        "trainer.fit(BoringModel())\n"
        "open(f'rank{trainer.global_rank}', 'w').write(' '.join([__name__, *sys.argv[1:]]))\n"
        "torch.distributed.destroy_process_group()\n"  # gloo's threads may abort the exit
    )
    ended = command("run", "ranks.py", "--seed", "1", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    for rank in range(2):
        assert (tmp_path / f"rank{rank}").read_text() == "__main__ --seed 1"
