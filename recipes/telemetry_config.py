"""Settings of what a run shows of itself."""

from __future__ import annotations

from typing import Literal

import msgspec


class TelemetryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[telemetry]`."""

    wandb: Literal["off", "offline", "online"] = "off"
    """`offline` writes a wandb run into the run folder (`wandb sync` sends it later); `online` sends as it goes."""
    project: str = "asyncrl"
    """The wandb project."""
    plain: bool = False
    """Plain lines also where the terminal could show the live view."""
