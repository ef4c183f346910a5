"""Machines that come and go, as Ray lists them."""

from asyncrl.runtime.machines import alive, changes


def node(name, *, up=True, **resources):
    return {
        "NodeID": name,
        "Alive": up,
        "NodeManagerAddress": f"10.0.0.{name}",
        "Resources": {"memory": 1e9, "node:10.0.0.1": 1.0, "object_store_memory": 1.0, **resources},
    }


def test_machines_are_named_by_address_and_what_they_have():
    assert alive([node("1", CPU=8.0, GPU=4.0), node("2", up=False)]) == {"1": "10.0.0.1 (CPU 8, GPU 4)"}
    assert alive([node("3")]) == {"3": "10.0.0.3 (no resources)"}


def test_only_what_changed_is_said():
    before, now = alive([node("1"), node("2")]), alive([node("2"), node("3", slot=1.0)])
    assert changes(before, now) == [
        "machine 10.0.0.3 (slot 1) joined",
        "machine 10.0.0.1 (no resources) is lost",
    ]
    assert changes(now, now) == []
