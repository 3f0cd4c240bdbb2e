"""Registries: members by the name that users type, each imported from its own module at its first use."""

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import TypeVar

from moqa.errors import MoqaError

Member = TypeVar("Member")


class Registry(MutableMapping[str, Member]):
    """Members of one kind.

    >>> METHODS = Registry("--method", "moqa.methods", ("gptq", "rtn"))
    >>> METHODS.find("awq")
    Traceback (most recent call last):
    moqa.errors.MoqaError: --method awq is unknown: there are gptq, rtn

    Args:
        option: command-line option that takes a name, for error messages.
        package: contains a module for each name; importing the module registers the member.
        names: names of the members.
    """

    def __init__(self, option: str, package: str, names: Iterable[str]) -> None:
        self.option, self.package = option, package
        self._members: dict[str, Member | None] = dict.fromkeys(sorted(names))

    def find(self, name: str) -> Member:
        """Return the member with the name that a user typed.

        Raises:
            MoqaError: if there is no such member.
        """
        check_known(self.option, name, sorted(self))
        return self[name]

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __getitem__(self, name: str) -> Member:
        if self._members[name] is None:
            importlib.import_module(f"{self.package}.{name.replace('-', '_')}")
        member = self._members[name]
        assert member is not None, f"the module of {name} in {self.package} does not register it"
        return member

    def __setitem__(self, name: str, member: Member) -> None:
        self._members[name] = member

    def __delitem__(self, name: str) -> None:
        del self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


def check_known(option: str, name: str, names: Iterable[str]) -> None:
    """Check that a name is one of those that there are.

    >>> check_known("--ties", "head", ("none", "layer"))
    Traceback (most recent call last):
    moqa.errors.MoqaError: --ties head is unknown: there are none, layer

    Args:
        option: what the name was given for, for the message.
        name: as the user typed it.
        names: all that there are, in the order of the message.

    Raises:
        MoqaError: if it is none of them.
    """
    if name not in (known := list(names)):
        raise MoqaError(f"{option} {name} is unknown", f"there are {', '.join(known)}")


def modules_in(folder: Path) -> list[str]:
    """Names of the members that have a module in a folder; no module is imported.

    >>> modules_in(Path(moqa.__file__).parent / "planning/strategies")
    ['frequency', 'moqa', 'moqa-budget', 'moqa-v1', 'random', 'uniform']
    """
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules([str(folder)]))
