"""A real supervisor in a process of its own, over children that are given as data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 40.0  # only ever reached by a failure

DRIVER = """
import json, os, sys
from pathlib import Path
from daemon.supervise import Child, RestartPolicy, Supervisor

config = json.loads(sys.argv[1])
children = [Child(argv=tuple(c.pop("argv")), environment=dict(os.environ), **c)
            for c in config["children"]]
def say(notice):
    print(json.dumps([notice.kind, notice.name, notice.text]), flush=True)
supervisor = Supervisor(children, Path(config["log_dir"]), notify=say,
                        restart=RestartPolicy(**config.get("restart", {})),
                        on_ready=lambda: print(json.dumps(["all_ready", "", ""]), flush=True))
sys.exit(supervisor.run())
"""


class Tree:
    """A supervisor in a process of its own, and what it says."""

    def __init__(self, tmp_path: Path, config: dict[str, Any], **environment: str) -> None:
        self.notes = tmp_path
        config.setdefault("log_dir", str(tmp_path / "logs"))
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, json.dumps(config)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self.said: list[tuple[str, str, str]] = []

    def wait_for(self, kind: str, name: str = "") -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            heard = tuple(json.loads(line))
            self.said.append(heard)
            if heard[:2] == (kind, name):
                return str(heard[2])
        raise AssertionError(f"never heard {kind} of {name!r}; heard {self.said}")

    def end(self) -> int:
        assert self.process.stdout is not None
        self.said += [tuple(json.loads(line)) for line in self.process.stdout]
        return self.process.wait(PATIENCE_SECONDS)

    def noted(self) -> list[str]:
        path = self.notes / "notes"
        return path.read_text().splitlines() if path.exists() else []

    def pids(self) -> list[int]:
        return [int(line.split()[1]) for line in self.noted() if line.startswith("pid ")]
