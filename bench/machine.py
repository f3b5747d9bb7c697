"""What kind of machine this is, in words that say nothing of whose it is: figures without it mean nothing."""

from __future__ import annotations

import datetime
import os
import platform
import re
from pathlib import Path
from typing import Any


def facts(directory: Path) -> dict[str, Any]:
    """Processor, memory, the disk under `directory`, system, Python, and the date."""
    return {
        "date": datetime.date.today().isoformat(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": platform.machine(),
        "memory_gib": round(int(_found(r"^MemTotal:\s+(\d+)", Path("/proc/meminfo")) or 0) / (1 << 20)),
        "disk": _disk(directory),
        "system": platform.system(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def sentence(facts: dict[str, Any]) -> str:
    """The facts for a person."""
    return (
        f"{facts['date']}: {facts['cores']} cores ({facts['processor']}), {facts['memory_gib']} GiB, "
        f"{facts['disk']}, {facts['system']}, {facts['python']}"
    )


def _found(pattern: str, path: Path) -> str | None:
    try:
        match = re.search(pattern, path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return match[1].strip() if match else None


def _disk(directory: Path) -> str:
    """The file system and the kind of device under `directory`."""
    try:
        mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "an unknown disk"
    here = directory.resolve()
    mine = [m for m in mounts if here.is_relative_to(m[1])]
    device, _, kind = max(mine, key=lambda m: len(m[1]))
    if kind == "tmpfs":
        return "tmpfs (no disk at all)"
    name = re.sub(r"p?\d+$", "", Path(device).name)
    try:
        turns = Path(f"/sys/block/{name}/queue/rotational").read_text().strip() == "1"
    except OSError:
        return kind
    virtual = "virtual " if name.startswith(("vd", "xvd")) else ""
    return f"{kind} on a {virtual}disk{' that turns' if turns and not virtual else ''}"
