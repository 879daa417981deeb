"""A stand-in for sbatch and squeue on PATH: it keeps what it was given, and answers what it is told."""

from __future__ import annotations

from pathlib import Path

import pytest


class FakeSlurm:
    """In ``folder``: ``submitted/N`` are scripts as they were handed over, ``queue`` is what squeue prints."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        (folder / "submitted").mkdir()
        (folder / "queue").touch()
        self._program(
            "sbatch",
            f"""if [[ -f {folder}/refusal ]]; then cat {folder}/refusal >&2; exit 1; fi
n=$(($(ls {folder}/submitted | wc -l) + 101))
cp "${{@: -1}}" {folder}/submitted/$n
env > {folder}/environment
echo "$n;cluster"
""",
        )
        self._program(
            "squeue", f"if [[ -f {folder}/down ]]; then echo 'no answer' >&2; exit 1; fi; cat {folder}/queue\n"
        )
        monkeypatch.setenv("PATH", f"{folder}/bin:/usr/bin:/bin")

    def _program(self, name: str, body: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}")
        path.chmod(0o755)

    @property
    def scripts(self) -> list[str]:
        """What was submitted, in order."""
        return [path.read_text() for path in sorted((self.folder / "submitted").iterdir())]

    @property
    def environment(self) -> str:
        """That sbatch was started in."""
        return (self.folder / "environment").read_text()

    def refuse(self, words: str) -> None:
        """From now on."""
        (self.folder / "refusal").write_text(words)

    def go_down(self) -> None:
        """squeue answers no more."""
        (self.folder / "down").touch()

    def queue(self, *jobs: str) -> None:
        """Lines as squeue is asked for them: id|id of the array|state|elapsed|nodes|reason."""
        (self.folder / "queue").write_text("".join(f"{job}\n" for job in jobs))


def take_away(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A machine without SLURM, but with bash."""
    folder.mkdir()
    (folder / "bash").symlink_to("/bin/bash")
    monkeypatch.setenv("PATH", str(folder))
