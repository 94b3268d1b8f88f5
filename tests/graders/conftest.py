"""One worker process for all tests of a module: it imports torch once."""

import pytest

from course_lib.grading.grade import Worker


@pytest.fixture(scope="module")
def worker():
    with Worker() as one:
        yield one
