"""The installer: what it installs, what it refuses to start with, and how it stops.

The script is the real one; `python3` is a stand-in that makes environments without a download.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy/install.sh"

# Copies itself into the environment; writes down each call of pip, and hangs in it when told to.
FAKE_PYTHON = """#!/bin/bash
case "$1 $2" in
  "-m venv")
    mkdir -p "$3/bin" "$3/lib/{library}"
    cp "$0" "$3/bin/python"
    ;;
  "-m pip")
    printf '%s\\n' "$*" >>'{folder}/pip-calls'
    if [ "$3" = install ] && [ -e '{folder}/hang' ]; then
      sleep 60 &
      printf '%s %s\\n' $$ $! >'{folder}/pids.new'
      mv '{folder}/pids.new' '{folder}/pids'
      wait
    fi
    ;;
  *) exec '{real}' "$@" ;;
esac
"""


class Machine:
    """A directory of stand-in programs, and the installer run with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        library = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        python = FAKE_PYTHON.format(folder=folder, library=library, real=sys.executable)
        self.program("python3", python)
        self.program("nvidia-smi", "#!/bin/bash\nexit 1\n")
        self.free_disk(100)
        self.environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "PYTHON": "python3",
            "TMPDIR": str(folder),
            "HOME": str(folder),
        }

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def free_disk(self, gigabytes: int) -> None:
        row = f"/dev/x 1 1 {gigabytes * 1000 * 1000} 1% /"
        self.program("df", f"#!/bin/bash\necho header\necho '{row}'\n")

    def install(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT, *arguments],
            cwd=cwd or self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def installs(self) -> list[str]:
        calls = self.folder / "pip-calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        return [line for line in lines if line.startswith("-m pip install")]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_everything_is_installed_with_the_pins_and_a_repeat_does_nothing(machine: Machine) -> None:
    done = machine.install("--extras", "demo,dev", "env")
    assert done.returncode == 0, done.stderr
    installs = machine.installs()
    assert len(installs) == 3
    assert all("-c deploy/constraints/cpu.txt" in call for call in installs)
    assert machine.install("--extras", "demo,dev", "env").stdout == ""
    assert machine.installs() == installs


def test_the_environment_is_relative_to_the_caller(machine: Machine) -> None:
    (machine.folder / "inner").mkdir()
    done = machine.install("../env", cwd=machine.folder / "inner")
    assert done.returncode == 0, done.stderr
    assert (machine.folder / "env/moorline-installed").exists()


def test_make_takes_an_environment_elsewhere(machine: Machine) -> None:
    elsewhere = os.path.relpath(machine.folder / "env", ROOT)
    subprocess.run(
        ["make", "-s", "-C", ROOT, "setup", f"VENV={elsewhere}"],
        env=machine.environment,
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert (machine.folder / "env/moorline-installed").exists()


def test_an_environment_whose_interpreter_is_gone_is_refused(machine: Machine) -> None:
    assert machine.install("env").returncode == 0
    python = machine.folder / "env/bin/python"
    python.unlink()
    python.symlink_to(machine.folder / "no-such-python")
    refused = machine.install("env")
    assert refused.returncode == 1
    assert "is gone" in refused.stderr
    assert f"rm -r '{machine.folder}/env'" in refused.stderr


def test_an_environment_of_another_python_is_refused(machine: Machine) -> None:
    assert machine.install("env").returncode == 0
    library = next((machine.folder / "env/lib").iterdir())
    library.rename(library.with_name("python3.4"))
    refused = machine.install("env")
    assert refused.returncode == 1
    assert "another version of Python" in refused.stderr


def test_a_python_that_does_not_fit_is_refused(machine: Machine) -> None:
    machine.program("python3", "#!/bin/bash\nexit 1\n")
    refused = machine.install("env")
    assert refused.returncode == 1
    assert "no Python 3.11 to 3.14 was found" in refused.stderr


def test_a_python_without_venv_is_refused_with_the_package_to_install(machine: Machine) -> None:
    machine.program("python3", '#!/bin/bash\n[[ "$2" != *ensurepip* ]]\n')
    refused = machine.install("env")
    assert refused.returncode == 1
    assert "python3 lacks venv or ensurepip" in refused.stderr


def test_too_little_disk_is_said_before_anything_is_made(machine: Machine) -> None:
    machine.free_disk(4)
    refused = machine.install("env")
    assert refused.returncode == 1
    assert "lacks 5 GB of disk" in refused.stderr
    assert not (machine.folder / "env").exists()


def test_a_gpu_machine_without_compiler_and_headers_is_told_all_at_once(machine: Machine) -> None:
    machine.program("nvidia-smi", "#!/bin/bash\necho 'GPU 0: one'\n")
    machine.free_disk(14)
    python = (machine.bin / "python3").read_text()
    headers = 'if [[ "$*" == *get_path* ]]; then echo /nonexistent; exit; fi'
    machine.program("python3", python.replace("#!/bin/bash\n", f"#!/bin/bash\n{headers}\n"))
    tools = ("bash", "sh", "dirname", "grep", "awk", "cat", "cut", "sha256sum", "du", "env")
    for tool in tools:
        target = next(p for p in (Path("/usr/bin") / tool, Path("/bin") / tool) if p.exists())
        (machine.bin / tool).symlink_to(target)
    machine.environment["PATH"] = str(machine.bin)  # no compiler on it
    refused = machine.install("env")
    assert refused.returncode == 1
    assert "lacks 15 GB of disk" in refused.stderr
    assert "lacks a C compiler" in refused.stderr
    assert "lacks /nonexistent/Python.h" in refused.stderr
    assert machine.installs() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_installation_leaves_no_pip_and_no_stamp(
    machine: Machine, number: signal.Signals
) -> None:
    assert machine.install("env").returncode == 0
    stamp = machine.folder / "env/moorline-installed"
    stamp.write_text("of an older pyproject.toml")
    (machine.folder / "hang").touch()
    process = subprocess.Popen(
        [SCRIPT, "env"],
        cwd=machine.folder,
        env=machine.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A run of tests in the background hands on an ignored SIGINT, and bash cannot trap that.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 30
    while not (machine.folder / "pids").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(pid) for pid in (machine.folder / "pids").read_text().split()]
    before = len(machine.installs())
    process.send_signal(number)
    assert process.wait(20) == 130
    assert [pid for pid in pids if runs(pid)] == []
    assert not stamp.exists()
    assert len(machine.installs()) == before


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_the_installer_takes_the_pythons_that_pyproject_declares() -> None:
    ((low, high),) = re.findall(
        r'requires-python = ">=3\.(\d+),<3\.(\d+)"', (ROOT / "pyproject.toml").read_text()
    )
    assert f"(3, {low}) <= sys.version_info[:2] < (3, {high})" in SCRIPT.read_text()


def test_the_installers_torch_is_the_pinned_one() -> None:
    (version,) = re.findall(r"^torch_cpu=torch==(.+)\+cpu$", SCRIPT.read_text(), re.MULTILINE)
    assert f"\ntorch=={version}\n" in (ROOT / "deploy/constraints/cpu.txt").read_text()
