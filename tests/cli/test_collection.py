"""Imports are no garbage."""

import gc

from fewstep.cli.collection import without_collection


def test_garbage_is_collected_after_the_block_and_not_within() -> None:
    assert gc.isenabled()
    try:
        with without_collection():
            assert not gc.isenabled()
        assert gc.isenabled() and gc.get_freeze_count()
        gc.disable()
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
