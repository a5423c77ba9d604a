from __future__ import annotations

import pytest
from end_to_end.tour import Tour, make_tour


@pytest.fixture(scope="session")
def tour(server, tmp_path_factory, assets) -> Tour:
    """The runs that the tests of the group "tour" share."""
    return make_tour(server, tmp_path_factory.mktemp("tour"), assets)
