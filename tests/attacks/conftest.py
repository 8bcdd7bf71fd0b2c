"""One tiny LLaVA on disk for the whole session."""

from pathlib import Path

import pytest

from tests.tiny import save_tiny_llava


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("tiny"), reserved=64)
