"""The versions of vLLM that moqa was tested with: what a plug-in uses of it changes from one to the next."""

import re

from moqa.errors import MoqaError

# the first that was tested, and the first that was not, as in the extra `vllm` of pyproject.toml
FIRST, NEXT = (0, 32), (0, 33)


def is_tested(version: str) -> bool:
    """Whether a version of vLLM was tested.

    >>> is_tested("0.32.1"), is_tested("0.33.0")
    (True, False)
    """
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    return FIRST <= numbers < NEXT


def check_version(found: str) -> None:
    """Refuse a vLLM that was not tested.

    >>> check_version("0.31.2")
    Traceback (most recent call last):
    moqa.errors.MoqaError: vLLM 0.31.2 was not tested with this version of moqa: it serves with vLLM >=0.32,<0.33

    Raises:
        MoqaError: if it was not.
    """
    if not is_tested(found):
        first, after = (".".join(map(str, version)) for version in (FIRST, NEXT))
        raise MoqaError(
            f"vLLM {found} was not tested with this version of moqa", f"it serves with vLLM >={first},<{after}"
        )
