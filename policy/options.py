"""Command-line options and YAML keys of a config dataclass: help, types, checks. Runs nothing.

The dataclass is the one source: a field's type and default make the option, the comment on the field's
line is its help, a nested dataclass gives dotted options. Types are parsed by jsonargparse; what it says
of an error is put into one line that names the file or option, what was wrong, and what to do.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import io
import re
import shutil
import textwrap
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, TypeGuard, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, get_loader

from configs import recipe_names, recipe_path
from rubric_data.errors import UserError

Config = TypeVar("Config")


class Option(NamedTuple):
    """One leaf field of a config dataclass, nested ones included."""

    key: str  # dotted path of field names
    hint: Any
    default: Any  # dataclasses.MISSING where the field is required
    help: str


def options_of(config_class: type, hidden: Sequence[str] = ()) -> list[Option]:
    """Every leaf field of ``config_class`` in the order of its definition, without the ``hidden`` keys."""
    return [option for option in _walk(config_class, "", None) if option.key not in hidden]


def _is_section(hint: Any) -> TypeGuard[type[Any]]:
    """Whether a field of type ``hint`` holds options of its own."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _walk(config_class: type, prefix: str, instance: object) -> Iterator[Option]:
    hints, comments = get_type_hints(config_class), field_comments(config_class)
    for field in _own_first(config_class):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        default: Any = field.default
        if instance is not None:
            default = getattr(instance, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if _is_section(hint):
            yield from _walk(hint, f"{key}.", None if default is dataclasses.MISSING else default)
        else:
            yield Option(key, hint, default, comments.get(field.name, ""))


def _own_first(config_class: type) -> list[dataclasses.Field[Any]]:
    """The fields of ``config_class``, those it inherits after its own."""
    own = inspect.get_annotations(config_class)
    return sorted(dataclasses.fields(config_class), key=lambda field: field.name not in own)


def field_comments(config_class: type) -> dict[str, str]:
    """The comment at the end of each field's line in the source of ``config_class`` and of what it inherits from."""
    sources = [base for base in reversed(config_class.__mro__) if dataclasses.is_dataclass(base)]
    return {name: comment for source in sources for name, comment in _own_comments(source).items()}


@functools.cache
def _own_comments(config_class: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(config_class))
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    names = {
        node.end_lineno: node.target.id
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = (token for token in tokens if token.type == tokenize.COMMENT)
    return {
        names[token.start[0]]: token.string.removeprefix("#").strip() for token in comments if token.start[0] in names
    }


class _Help(DefaultHelpFormatter):
    """Help of an option: its comment, then whether it is required or what its default is."""

    def _get_help_string(self, action: Any) -> str:
        if not isinstance(action.default, (str, int, float, NoneType)) or action.dest in ("help", "config"):
            return action.help or ""
        default = "unset" if action.default is None else str(action.default)
        if isinstance(action.default, bool):
            default = default.lower()  # as it is written in YAML and on the command line
        return f"{action.help or ''} ({'required' if action.required else f'default: {default}'})".lstrip()


def width_of_help() -> int:
    """Columns of every help text: those of the terminal, but for the two that argparse leaves free."""
    return shutil.get_terminal_size().columns - 2


def build_parser(
    config_class: type, *, prog: str, description: str = "", epilog: str = "", hidden: Sequence[str] = ()
) -> ArgumentParser:
    """A jsonargparse parser with one option for every field of ``config_class``; nested ones are grouped."""
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--option VALUE ...]",
        description=description,
        epilog=epilog,
        formatter_class=_Help,
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="YAML file of options; a recipe's bare name will do"
    )
    groups: dict[str, Any] = {"": parser}
    for option in options_of(config_class, hidden):
        section = option.key.rpartition(".")[0]
        if section not in groups:
            nested = functools.reduce(
                lambda holder, name: get_type_hints(holder)[name], section.split("."), config_class
            )
            groups[section] = parser.add_argument_group(section, inspect.cleandoc(nested.__doc__ or ""))
        given: dict[str, Any] = (
            {"required": True} if option.default is dataclasses.MISSING else {"default": option.default}
        )
        if get_origin(_without_none(option.hint)) is not Literal and option.hint is not bool:
            given["metavar"] = _METAVARS.get(_without_none(option.hint), "VALUE")
        groups[section].add_argument(f"--{option.key}", type=option.hint, help=option.help, **given)
    return parser


_METAVARS = {int: "N", float: "X", str: "TEXT", list[str]: "[TEXT,...]"}


def parse(
    config_class: type[Config], argv: Sequence[str], parser: ArgumentParser, hidden: Sequence[str] = ()
) -> Config:
    """The config that ``argv`` describes: the files given by --config in their order, then the other options.

    ``hidden`` keys keep their defaults and may not be given. Raises UserError on the first fault.
    """
    options = {option.key: option for option in options_of(config_class, hidden)}
    files, rest = _split_config_files(argv)
    given: list[str] = []
    for name in files:
        path = locate(name)
        check_recipe(path, options, hidden)
        given += ["--config", str(path)]
    try:
        namespace = parser.parse_args([*given, *rest])
    except Exception as error:  # jsonargparse raises ArgumentError, TypeError and ValueError alike
        raise UserError(_explain(str(error), options, hidden)) from None
    return _build(config_class, namespace)


def _split_config_files(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of --config, and the other arguments: options given beside a file win wherever they stand."""
    files, rest, arguments = [], [], iter(argv)
    for argument in arguments:
        if argument == "--config":
            value = next(arguments, None)
            if value is None:
                raise UserError("--config: a file is missing after it; give a YAML file or a recipe's name")
            files.append(value)
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    return files, rest


def locate(name: str) -> Path:
    """The YAML file ``name``: a path, or else the bare name of a packaged recipe. Raises UserError."""
    path = Path(name)
    if path.is_file():
        return path
    if path.name == name and name.removesuffix(".yaml") in recipe_names():
        return recipe_path(name)
    fault = "is a folder" if path.is_dir() else "no such file"
    raise UserError(f"{name}: {fault}; give a YAML file, or the name of a recipe: {', '.join(recipe_names())}")


def from_content(
    config_class: type[Config], content: Mapping[str, Any], where: str, own: Mapping[str, Any] | None = None
) -> Config:
    """The config that ``content`` describes, which is a part of a recipe, as YAML has it.

    ``own``: options that the caller sets itself, by dotted key; ``content`` may not give them. Raises UserError that
    begins with ``where`` on a key that is unknown, of a wrong type, or missing.
    """
    own = own or {}
    options = {option.key: option for option in options_of(config_class, tuple(own))}
    check_content(where, content, options, tuple(own))
    given = {key: _as_hint(value, options[key].hint) for key, value in _leaves(content, "", options)}
    missing = [key for key, option in options.items() if option.default is dataclasses.MISSING and key not in given]
    if missing:
        raise UserError(f"{where}: '{missing[0]}' is missing ({options[missing[0]].help}); give it")
    return _build(config_class, {**given, **own})


def check_content(
    where: str, content: Mapping[Any, Any], options: Mapping[str, Option], hidden: Sequence[str] = ()
) -> None:
    """Raise UserError that begins with ``where`` at the first key that is unknown, or whose value has a wrong type."""
    _check_keys(where, "", content, options, hidden)


def _leaves(content: Mapping[str, Any], prefix: str, options: Mapping[str, Option]) -> Iterator[tuple[str, Any]]:
    """The values of ``content`` by the dotted keys of ``options``."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        if key in options:
            yield key, value
        else:
            yield from _leaves(value, f"{key}.", options)


def _as_hint(value: Any, hint: Any) -> Any:
    """A whole number as a float where that is asked for: YAML has them without a point."""
    return float(value) if value is not None and _without_none(hint) is float else value


def check_recipe(path: Path, options: Mapping[str, Option], hidden: Sequence[str] = ()) -> None:
    """Raise UserError at the first key of the YAML file ``path`` that is unknown, or whose value has a wrong type."""
    try:
        content = get_loader("yaml")(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; give a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise UserError(f"{path}{where}: broken YAML ({problem}); correct the line") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no options; write lines of the form 'option: value'")
    check_content(str(path), content, options, hidden)


def _check_keys(
    where: str, prefix: str, content: Mapping[Any, Any], options: Mapping[str, Option], hidden: Sequence[str]
) -> None:
    sections = {key[: dot.start()] for key in options for dot in re.finditer(r"\.", key)}
    for name, value in content.items():
        key = f"{prefix}{name}"
        if key in sections:
            if not isinstance(value, dict):
                raise UserError(f"{where}: '{key}' is a section; indent its options below it")
            _check_keys(where, f"{key}.", value, options, hidden)
        elif key not in options:
            raise UserError(f"{where}: {_unknown('key', key, [*options, *sections], hidden)}")
        elif not _fits(value, options[key].hint):
            raise UserError(f"{where}: '{key}' must be {expectation(options[key].hint)}, got {value!r}")


def _unknown(kind: str, key: str, known: Sequence[str], hidden: Sequence[str] = ()) -> str:
    dashes = "--" if kind == "option" else ""
    if key in hidden:
        return f"{kind} '{dashes}{key}' is set by the stage itself; remove it"
    # without its section (learning_rate), cut short (train.learn), or mistyped within its section
    section, _, name = key.rpartition(".")
    within = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == section}
    close = [other for other in known if other.endswith(f".{key}")]
    close += [other for other in known if other.startswith(key)]
    close += [within[near] for near in difflib.get_close_matches(name, within, n=1)]
    advice = f"did you mean '{dashes}{close[0]}'?" if close else "see --help for those there are"
    return f"unknown {kind} '{dashes}{key}'; {advice}"


def _without_none(hint: Any) -> Any:
    """X of ``X | None``; any other hint as it is."""
    left = [arg for arg in get_args(hint) if arg is not NoneType] if NoneType in get_args(hint) else []
    return left[0] if len(left) == 1 else hint


def _fits(value: object, hint: Any) -> bool:
    """Whether a value read from YAML is one of type ``hint``."""
    if NoneType in get_args(hint):
        return value is None or _fits(value, _without_none(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint


def expectation(hint: Any) -> str:
    """What a value of type ``hint`` looks like, in words."""
    if NoneType in get_args(hint):
        return f"{expectation(_without_none(hint))}, or null"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(str(choice) for choice in get_args(hint))}"
    if hint == list[str]:
        return "a list such as [a, b]"
    if get_origin(hint) in (list, dict):
        return "a section of options" if get_origin(hint) is dict else "a list of sections of options"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def _explain(message: str, options: Mapping[str, Option], hidden: Sequence[str]) -> str:
    """One line for what jsonargparse says of the command line."""
    message = " ".join(message.split())
    if match := re.match(r"unrecognized arguments: (\S+)", message, re.IGNORECASE):
        argument = match[1].partition("=")[0]
        if argument.startswith("--"):
            return _unknown("option", argument.removeprefix("--"), list(options), hidden)
        return f"unexpected argument '{argument}'; write options as --option VALUE"
    match = re.search(r'[Kk]ey "([^"]+)".*(?:Got|Given) value: (.*?)(?: -|$)', message)
    if match and match[1] in options:
        told = f"option '--{match[1]}' must be {expectation(options[match[1]].hint)}, got '{match[2]}'"
        lists = options[match[1]].hint in (list[str], list[str] | None)
        return f"{told}; write --{match[1]} '[a, b]', quotation marks included" if lists else told
    if match := re.match(r"the following arguments are required: (.*)", message):
        missing = [key.strip() for key in match[1].split(",")]
        named = ", ".join(f"--{key} ({options[key].help})" for key in missing)
        return f"missing: {named}; give it here or in the --config file"
    if match := re.match(r"argument --([^\s/]+)\S*: expected one argument", message):  # lists have a second name
        return f"option '--{match[1]}' must be {expectation(options[match[1]].hint)}, got nothing"
    return message


def _build(
    config_class: type[Config], namespace: Namespace | Mapping[str, Any], prefix: str = "", default: Any = None
) -> Config:
    """An instance of ``config_class`` from ``namespace``; what is absent there is taken from ``default``."""
    hints, values = get_type_hints(config_class), {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if _is_section(hint):
            nested = None if field.default_factory is dataclasses.MISSING else field.default_factory()
            values[field.name] = _build(hint, namespace, f"{key}.", nested)
        elif key in namespace:
            values[field.name] = namespace[key]
    return config_class(**values) if default is None else dataclasses.replace(default, **values)


def to_yaml(config: object, hidden: Sequence[str] = ()) -> str:
    """``config`` as YAML that --config reads back, without the ``hidden`` keys."""
    content: dict[str, Any] = {}
    for option in options_of(type(config), hidden):
        *sections, name = option.key.split(".")
        holder, source = content, config
        for section in sections:
            holder, source = holder.setdefault(section, {}), getattr(source, section)
        holder[name] = getattr(source, name)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
