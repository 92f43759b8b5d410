"""Writes the public API, names and signatures, into public_api.txt beside this file: `make api`.

It is the `__all__` of each package that has one, and what the modules in `MODULES` define. Of a class its own methods
and properties are listed, not those of torch's.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, get_origin

FILE = Path(__file__).with_name("public_api.txt")
PACKAGES = ("fastcure", "fastcure_kernels")
MODULES = (
    *("fastcure.evaluation.accuracy", "fastcure.evaluation.checklist", "fastcure.evaluation.interval"),
    "fastcure.profiling.flops",
    *("fastcure.profiling.traffic", "fastcure.reference", "fastcure.units"),
)


def public_api() -> str:
    """Return a line for each public name."""
    modules = [*map(import_module, PACKAGES), *map(import_module, MODULES)]
    for package in PACKAGES:
        found = pkgutil.iter_modules(import_module(package).__path__)
        names = [f"{package}.{each.name}" for each in found if each.ispkg and not each.name.startswith("_")]
        modules += [module for module in map(import_module, names) if hasattr(module, "__all__")]
    modules.sort(key=lambda module: module.__name__)
    return "".join(f"{line}\n" for module in modules for line in describe_module(module))


def describe_module(module: ModuleType) -> Iterator[str]:
    own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", None) == module.__name__]
    for name in sorted(getattr(module, "__all__", [name for name in own if not name.startswith("_")])):
        yield from describe(f"{module.__name__}.{name}", getattr(module, name))


def describe(path: str, thing: Any) -> Iterator[str]:
    if isinstance(thing, type):
        yield f"{path}{signature(thing)}"
        for name in sorted(dir(thing)):
            member = inspect.getattr_static(thing, name)
            if name.startswith("_") or not defined_by_us(thing, name):
                continue
            if isinstance(member, property):
                yield f"    .{name}"
            elif isinstance(member, (FunctionType, classmethod, staticmethod)):
                yield f"    .{name}{signature(getattr(thing, name))}"
    elif isinstance(thing, FunctionType):
        yield f"{path}{signature(thing)}"
    elif isinstance(thing, Mapping):
        yield f"{path}: {', '.join(map(str, thing))}"
    else:
        yield f"{path}: {thing if get_origin(thing) else type(thing).__name__}"


def defined_by_us(kind: type, name: str) -> bool:
    owner = next(base for base in kind.__mro__ if name in vars(base))
    return owner.__module__.split(".")[0] in PACKAGES


def signature(thing: Any) -> str:
    try:
        found = inspect.signature(thing)
    except ValueError:  # an exception that inherits its constructor
        return ""
    parts, stars = list[str](), False
    for parameter in found.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            stars = True
        elif parameter.kind is parameter.KEYWORD_ONLY and not stars:
            stars = True
            parts.append("*")
        mark = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        typed = "" if parameter.annotation is parameter.empty else f": {annotation(parameter.annotation)}"
        default = "" if parameter.default is parameter.empty else f" = {value(parameter.default)}"
        parts.append(f"{mark}{parameter.name}{typed}{default}")
    result = found.return_annotation
    arrow = "" if result is found.empty or isinstance(thing, type) else f" -> {annotation(result)}"
    return f"({', '.join(parts)}){arrow}"


def annotation(found: Any) -> str:
    found = getattr(found, "__forward_arg__", found)  # of a NamedTuple
    return found if isinstance(found, str) else inspect.formatannotation(found)


def value(default: Any) -> str:
    """A default's text; of a function or an object its name, without its address."""
    if isinstance(default, (type, FunctionType, BuiltinFunctionType)):
        return default.__name__
    text = repr(default)
    return f"<{type(default).__name__}>" if " at 0x" in text or text == "<factory>" else text


if __name__ == "__main__":
    FILE.write_text(public_api())
    print(f"written: {FILE}")
