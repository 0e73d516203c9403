"""The commit that a row is about."""

import subprocess
from collections.abc import Collection
from pathlib import Path

from megatron_ext.errors import UserError

MAIN = ("refs/heads/main", "refs/remotes/*/main")


def known_commit(folder: Path, free: Collection[Path] = ()) -> str:
    """The commit that is checked out in ``folder``: part of main, and nothing changed but the files ``free``.

    Raises:
        UserError: no repository, a file that was changed or added, or a commit that others do not have.
    """
    root = Path(_git(folder, "rev-parse", "--show-toplevel").strip())
    commit = _git(folder, "rev-parse", "--verify", "HEAD").strip()
    allowed = {str(Path(file).resolve().relative_to(root)) for file in free if _within(file, root)}
    entries = _git(folder, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all").split("\0")
    for entry in filter(None, entries):
        if entry[3:] not in allowed:
            state = "is not in the commit" if entry.startswith("??") else "was changed"
            raise UserError(f"{root / entry[3:]}: {state}; a row is about a commit, so commit or remove it")
    if not _git(folder, "for-each-ref", "--contains", commit, "--format=%(refname)", *MAIN).strip():
        raise UserError(f"{root}: commit {commit[:10]} is not part of main, so others cannot run it")
    return commit


def _within(file: Path, root: Path) -> bool:
    return Path(file).resolve().is_relative_to(root)


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"git: {error.strerror}; a row names the commit that was run") from None
    if done.returncode:
        raise UserError(f"{folder}: {done.stderr.strip().splitlines()[-1]}; a row names the commit that was run")
    return done.stdout
