"""What tests of profiling and quantizing share: small settings, what a refusal says, and what a folder holds."""

import pytest

from moqa.errors import MoqaError

SMALL = {"samples": 6, "context": 32, "self_samples": 2}


def refusal(function, *args, **options):
    with pytest.raises(MoqaError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
