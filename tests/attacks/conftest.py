"""One tiny LLaVA on disk for the whole session, and decoders of released tokens that take no time."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from attacks.fusion import reconstruction
from tests.tiny import save_tiny_llava


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("tiny"), reserved=64)


@pytest.fixture(scope="module", autouse=True)
def _few_public_pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """What decoders reach is the subject of one module; in every other audit they only have to be there."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.module.__name__.endswith("test_fusion_reconstruction"):
            few = partial(reconstruction.public_corpora, train=60, test=10)
            patch.setattr(reconstruction, "public_corpora", few)
            patch.setattr(reconstruction, "STEPS", 50)
        yield
