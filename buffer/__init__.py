"""What lies between generation and learning: one ledger of every rollout, its tokens, and their log on disk.

Imports no sibling.
"""

from asyncrl.buffer.client import BufferClient
from asyncrl.buffer.config import BufferConfig, StalenessConfig
from asyncrl.buffer.connection import BufferAddress
from asyncrl.buffer.reader import BlockingBufferClient
from asyncrl.buffer.records import PromptRow, Segment, ledger_settings
from asyncrl.buffer.service import BufferService

__all__ = [
    "BlockingBufferClient",
    "BufferAddress",
    "BufferClient",
    "BufferConfig",
    "BufferService",
    "PromptRow",
    "Segment",
    "StalenessConfig",
    "ledger_settings",
]
