"""What lies between generation and learning: one ledger of every rollout, its tokens, and their log on disk.

Imports no sibling.
"""

from asyncrl.buffer.client import BlockingBufferClient, BufferClient
from asyncrl.buffer.config import BufferConfig, StalenessConfig
from asyncrl.buffer.service import BufferService

__all__ = ["BlockingBufferClient", "BufferClient", "BufferConfig", "BufferService", "StalenessConfig"]
