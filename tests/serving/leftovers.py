"""What a process leaves when it is gone: processes, shared memory, temporary files."""

from __future__ import annotations

from pathlib import Path


class Leftovers:
    """Finds what was left by processes whose ``TMPDIR`` was ``folder`` or a folder in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shared_memory: set[Path] = set()

    def processes(self) -> dict[int, str]:
        """Command line by process id. Also takes note of their shared memory."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if f"TMPDIR={self._folder}".encode() not in (process / "environ").read_bytes():
                    continue
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
                for line in (process / "maps").read_text().splitlines():
                    if "/dev/shm/" in line:
                        self._shared_memory.add(Path(line.split(maxsplit=5)[5]))
            except OSError:  # it ended meanwhile
                continue
        return found

    def shared_memory(self) -> list[Path]:
        """What was ever noted and is still there."""
        return [path for path in self._shared_memory if path.exists()]

    def files(self) -> list[Path]:
        """Temporary files, but for torch's cache, which is kept on purpose."""
        return [one for one in self._folder.iterdir() if "torchinductor" not in one.name]

    def none(self) -> bool:
        return not (self.processes() or self.shared_memory() or self.files())
