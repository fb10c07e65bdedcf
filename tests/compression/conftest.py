"""What the tests of compression share."""

import pytest

from jaxsvd import demo


@pytest.fixture(scope="session")
def text():
    return demo.get_speeches(1950, 1999)
