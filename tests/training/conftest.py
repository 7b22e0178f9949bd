from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import write_tiny


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny planted data set: 4 steps of 32 sequences an epoch."""
    return write_tiny(tmp_path_factory.mktemp("training") / "tmp_data" / "synthetic", num_users=120)
