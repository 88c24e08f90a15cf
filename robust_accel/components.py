"""Components by name: a family's own class, or a user's ``package.module:Class``.

A class of a user's is code: its module is imported, and it is called with the section's settings.
"""

import faulthandler
import importlib
import inspect
import os
import select
import signal
import sys
import warnings
from collections.abc import Mapping
from typing import Any, NoReturn, Protocol

from robust_accel.attacks import Attack
from robust_accel.comm import Collective
from robust_accel.exit_codes import Stopped
from robust_accel.messages import close_to, shown, told
from robust_accel.objectives import Objective
from robust_accel.settings import Norm, OptionalPixels, Settings, default, listed

_IMPORT_LIMIT_S = 60  # of the trial
_IMPORTED = b"+"


class _Schedule(Protocol):
    """What ``make_scheduler`` asks of a schedule."""

    def factor(self, epoch: float, total_epochs: float) -> float: ...
    def check(self, epochs: float) -> None: ...


PROTOCOLS: dict[str, type] = {
    "attack": Attack,
    "objective": Objective,
    "schedule": _Schedule,
    "communication": Collective,
}


def is_custom(name: object, family: Mapping[str, type]) -> bool:
    """Whether a name stands for a user's own class."""
    return isinstance(name, str) and ":" in name and name not in family


class NotImported(Settings):
    """A component of a run folder whose class is not imported: what its plain values say.

    Args:
        name: The class that would be.
        norm, eps: Of an attack. Where the norm does not stand there, the eps is not known either:
            only the class knows whose radius it is.
        sigma: Of an objective.
    """

    name: str
    norm: Norm | None = None
    eps: OptionalPixels = default(None)
    sigma: OptionalPixels = default(None)

    @classmethod
    def of(cls, name: str, values: dict[str, Any]) -> "NotImported":
        known = {}
        for key in ("norm", "eps", "sigma"):
            try:
                known[key] = getattr(cls(name=name, **{key: values.get(key)}), key)
            except ValueError:  # it means something else there
                continue
        if known.get("norm") is None:
            known["eps"] = None
        return cls(name=name, **known)

    def why(self, section: str) -> str:
        """Why something is not known, and what would help."""
        return (
            f"{section}.name {shown(self.name)} is not imported from a run folder unless it is "
            "trusted (--trust)"
        )


def find_component(section: str, family: Mapping[str, type], name: object) -> type:
    """The class that a name stands for.

    A user's module is imported, and the class compared with the family's protocol; nothing that it
    names is called.

    Raises:
        ValueError: There is no such class, or it is none of the family.
    """
    if isinstance(name, str) and name in family:
        return family[name]
    if not is_custom(name, family):
        found = "missing" if name is None else f"{shown(name)} is unknown{close_to(name, family)}"
        raise ValueError(f"{found}; allowed: {listed(family)}, or package.module:Class")
    module, _, attribute = str(name).partition(":")
    end = _end_by_importing(module)
    if end is not None:
        raise ValueError(f"{shown(name)} cannot be imported: {end}")
    try:
        found = getattr(importlib.import_module(module), attribute)
        is_class = inspect.isclass(found)
        lack = _lack(found, PROTOCOLS[section]) if is_class else None  # asks its metaclass
    except (KeyboardInterrupt, Stopped):
        raise
    except BaseException as error:  # SystemExit is one
        hint = "; is its folder in PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
        hint = "; name it as an import does, without .py" if "/" in module else hint
        raise ValueError(f"{shown(name)} cannot be imported: {told(error)}{hint}") from error
    if not is_class:
        raise ValueError(f"{shown(name)} is no class, but {shown(found)}")
    if lack is not None:
        raise ValueError(f"{shown(name)} cannot be the {section}: it has no {lack}")
    return found


def _lack(found: type, protocol: type) -> str | None:
    """A method of the protocol that the class does not have, or that takes other arguments."""
    if protocol is Objective and _method(found, "for_batch") is not None:
        return None  # what it returns for a batch has these methods
    for name, declared in vars(protocol).items():
        if not inspect.isfunction(declared) or (name[0] == "_" and name != "__call__"):
            continue
        parameters = [*inspect.signature(declared).parameters.values()][1:]
        own = _method(found, name)
        if own is None or not _takes(own, parameters):
            named = [f"{p.name}=" if p.kind is p.KEYWORD_ONLY else p.name for p in parameters]
            return f"method {name}({', '.join(named)})"
    return None


def _method(found: type, name: str) -> Any:
    """As an instance would find it: not the metaclass's ``__call__``, which every class has."""
    holder = next((cls for cls in found.__mro__ if name in vars(cls)), None)
    return None if holder is None or not callable(getattr(found, name)) else vars(holder)[name]


def _takes(method: Any, parameters: list[inspect.Parameter]) -> bool:
    """Whether a method can be called, not awaited, with the arguments of the protocol's."""
    if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
        return False
    bound = isinstance(method, staticmethod | classmethod)
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    keywords = {p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY}
    try:
        signature = inspect.signature(method.__func__ if bound else method)
        own = 0 if isinstance(method, staticmethod) else 1
        signature.bind(*["self"] * own, *positional, **keywords)
    except TypeError:
        return False
    except ValueError:  # of a function in C, which does not tell
        return True
    return True


def _end_by_importing(module: str) -> str | None:
    """How an import ends its process, which no ``except`` could hold, or that it does not end.

    It is tried in a fork of this process, where all that most modules import is there already.

    Returns:
        None if all is well.
    """
    if module in sys.modules or not hasattr(os, "fork"):
        return None
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which the child does not use
        child = os.fork()
    if child == 0:
        _import_and_tell(module, writing)
    status = None
    try:
        os.close(writing)
        ready, _, _ = select.select([reading], [], [], _IMPORT_LIMIT_S)
        if not ready:
            return f"it takes more than {_IMPORT_LIMIT_S} s"
        if os.read(reading, 1):
            return None
        status = os.waitpid(child, 0)[1]
    finally:
        os.close(reading)
        if status is None:  # a module may keep its process from ending
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return f"it ends the process ({f'status {code}' if code >= 0 else f'signal {-code}'})"


def _import_and_tell(module: str, writing: int) -> NoReturn:
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nowhere, stream)
        faulthandler.disable()
        importlib.import_module(module)
    except BaseException:  # the import that counts will raise it again
        pass
    finally:
        try:
            os.write(writing, _IMPORTED)
        finally:  # a module may have closed all files: this process must not go on
            os._exit(0)
