"""Which memory a process can share with another: the name that two processes have in common if, and only if, both see the
same /dev/shm. Called by receivers, which say it when they join, and by the publisher.
"""

from __future__ import annotations

import os
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def this_host() -> str:
    """The boot of the kernel, the mounted /dev/shm and the user. Two containers of one machine that do not share /dev/shm have
    different names."""
    mount = os.stat("/dev/shm")
    return f"{_BOOT_ID.read_text().strip()}/{mount.st_dev}:{mount.st_ino}/{os.geteuid()}"
