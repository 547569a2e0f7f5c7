"""Command-line options from dataclasses: one field, one option, documented once.

A field's metadata holds `help` and, where the values are few, `choices`. Nested dataclasses are
flattened. The same reading serves a JSON or YAML file of fields given as `--config`.
"""

import argparse
import difflib
import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
_POWER_OF_TEN = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")


class UsageError(ValueError):
    """A request that cannot be carried out as given; its message is one line for a person."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with a suggestion for a misspelt option."""

    def error(self, message: str) -> NoReturn:
        """Print one line to stderr and leave with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def parse(self, arguments: list[str] | None) -> argparse.Namespace:
        """Parse, naming the nearest option for one that is unknown."""
        namespace, unknown = self.parse_known_args(arguments)
        if unknown:
            command: argparse.ArgumentParser = getattr(namespace, "parser", self)
            known = [option for action in command._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            command.error(f"unknown argument {unknown[0]}{hint}")
        return namespace


def _leaf_fields(cls: type) -> Iterator[tuple[Field[Any], Any]]:
    """Fields of `cls` and of dataclasses nested in it, with their resolved types."""
    hints = typing.get_type_hints(cls)
    for spec in fields(cls):
        if is_dataclass(hints[spec.name]):
            yield from _leaf_fields(hints[spec.name])
        else:
            yield spec, hints[spec.name]


def _default(spec: Field[Any]) -> Any:
    if spec.default_factory is not MISSING:
        return spec.default_factory()
    return spec.default


def _without_none(hint: Any) -> Any:
    """`X | None` as X: what an option's text is converted to."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add one option per field of the dataclass `cls` and of dataclasses nested in it.

    Args:
        parser: receives the options, in groups headed by the first line of a class's docstring.
        cls: dataclass whose fields carry `help` in their metadata.
    """
    title = (cls.__doc__ or cls.__name__).splitlines()[0].rstrip(".")
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(cls)
    for spec in fields(cls):
        hint = hints[spec.name]
        if isinstance(hint, type) and is_dataclass(hint):
            add_options(parser, hint)
            continue
        kind, default = _without_none(hint), _default(spec)
        text = spec.metadata["help"]
        if default is not MISSING and default not in (None, ()):
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            text += f" (default: {shown})"
        common: dict[str, Any] = {"dest": spec.name, "help": text.replace("%", "%%")}
        # absent options leave no trace, so that a --config file can fill them
        common["default"] = argparse.SUPPRESS
        flag = "--" + spec.name.replace("_", "-")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif typing.get_origin(kind) is tuple:
            item, *more = typing.get_args(kind)
            count = "*" if more == [Ellipsis] else 1 + len(more)
            group.add_argument(flag, type=item, nargs=count, metavar=item.__name__, **common)
        else:
            choices = spec.metadata.get("choices")
            metavar = None if choices else getattr(kind, "__name__", "value").lower()
            group.add_argument(flag, type=kind, choices=choices, metavar=metavar, **common)


def _decode(name: str, value: Any, hint: Any) -> Any:
    """A JSON value as a field's type."""
    kind = _without_none(hint)
    if value is None and kind is not hint:
        return None
    origin = typing.get_origin(kind)
    if origin is tuple and isinstance(value, list):
        item, *more = typing.get_args(kind)
        if more != [Ellipsis] and len(value) != 1 + len(more):
            raise UsageError(f"{name} must hold {1 + len(more)} values, got {value!r}")
        return tuple(_decode(name, part, item) for part in value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UsageError(f"{name} is too large for a number in the config file") from None
    if not isinstance(value, origin or kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(
            f"{name} must be {getattr(kind, '__name__', kind)}, got {value!r} in the config file"
        )
    return value


def build(cls: type[T], given: dict[str, Any], **fixed: Any) -> T:
    """Make a `cls` from parsed options.

    Args:
        cls: dataclass; nested dataclasses are built from the same options.
        given: option values by field name; absent ones take the field's default.
        fixed: fields set by the caller.

    Returns:
        The instance.

    Raises:
        UsageError: a required option is absent, or the class refuses a value.
    """
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = dict(fixed)
    for spec in fields(cls):  # pyright: ignore[reportArgumentType]
        if spec.name in values:
            continue
        if is_dataclass(hints[spec.name]):
            values[spec.name] = build(hints[spec.name], given)
        elif spec.name in given:
            value = given[spec.name]
            values[spec.name] = tuple(value) if isinstance(value, list) else value
        elif _default(spec) is MISSING:
            raise UsageError(f"--{spec.name.replace('_', '-')} is required")
    try:
        return cls(**values)
    except ValueError as error:
        raise UsageError(str(error)) from error


def read_object(path: Path, flag: str = "--config") -> dict[str, Any]:
    """The JSON object, or of a .yaml file the mapping, that a file holds.

    Raises:
        UsageError: the file is missing or holds no such thing, or PyYAML is missing.
    """
    wanted, data = "JSON object", None
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix in (".yaml", ".yml"):
            wanted, data = "YAML mapping", _yaml(text, f"{flag} {path}")
        else:
            data = json.loads(text)
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror or error}") from error
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{flag} {path}: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{flag} {path}: expected a {wanted}, got {type(data).__name__}")
    return data


def _yaml(text: str, where: str) -> Any:
    """What a YAML text holds: no name twice, and 1e-3 is a number, as in YAML 1.2."""
    try:
        import yaml
    except ImportError as error:
        remedy = "pip install 'llama-adapter-kernels[hf]'"
        raise UsageError(f"{where}: needs PyYAML: {remedy} ({error})") from None

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            names = [(key.tag, key.value) for key, _ in node.value if isinstance(key.value, str)]
            twice = [
                value for place, (tag, value) in enumerate(names) if (tag, value) in names[:place]
            ]
            if twice:
                raise UsageError(f"{where}: {twice[0]} is there twice")
            return node

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _POWER_OF_TEN, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: no YAML ({' '.join(str(error).split())})") from None


def read_config(path: Path, cls: type, flag: str = "--config") -> dict[str, Any]:
    """Read option values for `cls` from a JSON object, such as a run folder's config.json.

    Args:
        path: the file; a .yaml file holds a mapping.
        cls: dataclass whose options are read.
        flag: the option that named the file, for messages.

    Raises:
        UsageError: the file is missing or no JSON object, a name is unknown, a value has
            the wrong type.
    """
    data = read_object(path, flag)
    known = {spec.name: hint for spec, hint in _leaf_fields(cls)}
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat.update(value if isinstance(value, dict) and name not in known else {name: value})
    for name in flat:
        if name not in known:
            near = difflib.get_close_matches(str(name), list(known), n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise UsageError(f"{flag} {path}: unknown name {name}{hint}")
    return {name: _decode(name, value, known[name]) for name, value in flat.items()}
