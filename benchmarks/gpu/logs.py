"""The line of a log that explains a failure."""

import re
from pathlib import Path

_ERROR = re.compile(r"^(\[rank\d+\]:\s*)?([\w.]*(Error|Exception|NotRun)\b.*)|(.*NCCL WARN .*)")
_LAST = 200_000


def last_error(log: Path) -> str:
    """The last line that names an error, or a warning of nccl; empty if there is none."""
    if not log.exists():
        return ""
    text = log.read_bytes()[-_LAST:].decode(errors="replace")
    # torchrun reports the error of a child once more, without its message.
    matches = (_ERROR.match(line.strip()) for line in text.splitlines() if "ChildFailedError" not in line)
    lines = [match[2] or match[4] for match in matches if match]
    return lines[-1][:300] if lines else ""
