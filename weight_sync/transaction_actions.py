"""What a transaction tells its caller to do, in order. Pure data: made by `transaction`, carried out by `exchange`."""

from __future__ import annotations

import msgspec

from asyncrl.weight_sync.report import TransactionReport


class SendOffer(msgspec.Struct, frozen=True):
    """Tell `member` where the version's bytes are."""

    member: str


class SendApply(msgspec.Struct, frozen=True):
    """Tell `member` to make the version live."""

    member: str


class SendAbort(msgspec.Struct, frozen=True):
    """Tell `member` to forget the version."""

    member: str


class SendDismiss(msgspec.Struct, frozen=True):
    """Tell `member` that it is out of service."""

    member: str
    reason: str


class Finished(msgspec.Struct, frozen=True):
    """The last action."""

    report: TransactionReport


Action = SendOffer | SendApply | SendAbort | SendDismiss | Finished
Actions = list[Action]
