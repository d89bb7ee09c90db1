"""What several tests of the engine share."""

from __future__ import annotations

from typing import Any

import pytest
from together import results


@pytest.fixture(scope="session")
def together(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What the jobs of all chosen test files have found, after one launch of two workers."""
    asking = (item for item in request.session.items if "together" in getattr(item, "fixturenames", ()))
    files = sorted({item.module.__name__ for item in asking})
    return results(files, tmp_path_factory.mktemp("together"))
