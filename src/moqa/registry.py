"""Registries: members by the name that users type, each imported from its own module at its first use."""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from moqa.errors import MoqaError

Member = TypeVar("Member")
Function = TypeVar("Function")
Declared = ParamSpec("Declared")


class Registry(MutableMapping[str, Member]):
    """Members of one kind.

    >>> METHODS = Registry("--method", {"gptq": "moqa.methods.gptq", "rtn": "moqa.methods.rtn"})
    >>> METHODS.find("awq")
    Traceback (most recent call last):
    moqa.errors.MoqaError: --method awq is unknown: there are gptq, rtn

    Args:
        option: command-line option that takes a name, for error messages.
        modules: name of each member -> module that registers it when it is imported. Others are simply assigned.
        aliases: former name -> name of a member; accepted, but not listed.
    """

    def __init__(
        self, option: str, modules: Mapping[str, str] | None = None, aliases: Mapping[str, str] | None = None
    ) -> None:
        self.option, self._modules, self._aliases = option, modules or {}, aliases or {}
        self._members: dict[str, Member | None] = dict.fromkeys(self._modules)

    def find(self, name: str) -> Member:
        """Return the member with the name that a user typed.

        Raises:
            MoqaError: if there is no such member.
        """
        check_known(self.option, self.current(name), self)
        return self[self.current(name)]

    def current(self, name: str) -> str:
        """Name by which a member is called now; any other name is returned as it is.

        >>> Registry("--method", {"rtn": "moqa.methods.rtn"}, aliases={"round": "rtn"}).current("round")
        'rtn'
        """
        return name if name in self._members else self._aliases.get(name, name)

    def decorator(
        self, kind: Callable[Concatenate[str, Function, Declared], Member]
    ) -> Callable[Concatenate[str, Declared], Callable[[Function], Function]]:
        """Make a decorator for functions of members, which takes a name and what else `kind` takes.

        >>> MEANS = Registry("--mean")
        >>> mean = MEANS.decorator(lambda name, function: function)
        >>> @mean("middle")
        ... def middle(low, high):
        ...     return (low + high) / 2
        >>> MEANS.find("middle")(1, 2)
        1.5
        """

        def named(name: str, /, *args: Declared.args, **declared: Declared.kwargs) -> Callable[[Function], Function]:
            def register(function: Function) -> Function:
                self[name] = kind(name, function, *args, **declared)
                return function

            return register

        return named

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __getitem__(self, name: str) -> Member:
        if self._members[name] is None:
            importlib.import_module(self._modules[name])
        member = self._members[name]
        assert member is not None, f"{self._modules[name]} does not register {name}"
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


def modules_in(package: str, folder: Path) -> dict[str, str]:
    """Members that have a module each in a package: name -> module; none is imported.

    >>> list(modules_in("moqa.reduction.members", Path(moqa.__file__).parent / "reduction/members"))
    ['frequency', 'random', 'uncurl']
    """
    names = sorted(module.name for module in pkgutil.iter_modules([str(folder)]))
    return {name.replace("_", "-"): f"{package}.{name}" for name in names}
