"""What the documentation tells its reader to type: the blocks of its pages, and the commands in them and in its text.

Nothing is left out in silence: `kind` raises for a block that is neither commands, code, a file nor what a command is
known to print, and `commands` for a line among commands that begins with no program that is known.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from textwrap import dedent

import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    ROOT / "notebooks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
PROGRAMS = (
    *("python", "torchrun", "morphtrain", "make", "pip", "cd", "export", "eval", "srun", "sudo", ".ci/run"),
    *("jupyter", "mkdocs", "mlflow", "optuna-dashboard", "tensorboard", "wandb", "twine", "netron", "source"),
)
# Blocks of what commands print, of formulas and trees: how they begin.
PRINTED = (
    "after 120 epochs, 35.3 s of training",  # the closing table in the README
    "model=resnet32 norm=batch optimizer=sgd",  # maxbatch
    "both: epochs=40 timing.cores=1",  # compare
    "model.weights=base.pt: training starts",
    "grow=selective with prune=none",
    "7/20 trial 6:",  # a search
    "start-up: --help",
    "regulariser: ",
    "gradient: ResNet-8",
    "ghost norm: ",
    "memory: largest batch",
    "morphtrain/ ",  # the trees of the architecture
    "conf/ ",
    "experiment -> report",
    "lambda = lasso_ratio",  # formulas
    "i = round(x / 2^",
    "minimise 1/2 (loss",
    "lr * trust_coefficient",
)
FENCE = re.compile(r"^( *)```(\w*)$")
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
NAMED = re.compile(r"`([\w./-]+\.(?:py|yaml))`:$")  # at the end of a paragraph: the block below it is this file
ADD_TO = re.compile(
    r"add to `([^`]+)`"
)  # in the head of a table's column: its cells are commands without their beginning
ASSIGNED = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
INCLUDED = re.compile(r'^ *--8<-- "(.*)"$', re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """Lines that are shown as they are; `above` is the paragraph before them, `language` that of a fence."""

    page: Path
    line: int
    text: str
    above: str
    language: str = ""

    @property
    def where(self) -> str:
        return f"{_name(self.page)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """Words as the shell passes them on, and where: `directory` is relative to the root, "" for the root itself."""

    page: Path
    line: int
    words: tuple[str, ...]
    directory: str = ""

    @property
    def text(self) -> str:
        return shlex.join(self.words)

    @property
    def where(self) -> str:
        return f"{_name(self.page)}:{self.line}: {self.text}"


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name


@cache
def blocks(page: Path) -> tuple[Block, ...]:
    """The indented and fenced blocks of a page, in their order; an indented one is cut where commands begin or end."""
    return tuple(part for block in _whole_blocks(page) for part in _parts(block))


def _whole_blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text().splitlines()
    above: list[str] = []
    at = 0
    while at < len(lines):
        begin, blank_before = at, at == 0 or not lines[at - 1].strip()
        if fence := FENCE.match(lines[at]):
            at = next(n for n in range(at + 1, len(lines)) if lines[n].strip() == "```")
            yield Block(page, begin + 1, dedent("\n".join(lines[begin + 1 : at])), " ".join(above), fence[2] or "text")
            above = []
        elif lines[at].startswith("    ") and blank_before:
            while at + 1 < len(lines) and (lines[at + 1].startswith("    ") or not lines[at + 1].strip()):
                at += 1
            yield Block(page, begin + 1, dedent("\n".join(lines[begin : at + 1])).rstrip(), " ".join(above))
            above = []
        elif lines[at].strip():
            above = [lines[at].strip()] if blank_before else [*above, lines[at].strip()]
        at += 1


def _parts(block: Block) -> Iterator[Block]:
    """An indented block cut where commands begin, and where an empty line ends them."""
    if block.language:
        yield block
        return
    parts: list[tuple[int, list[str]]] = []
    after_empty = True
    for number, line in enumerate(block.text.split("\n"), start=block.line):
        within = bool(parts) and _begins_with_aprogram_of("\n".join(parts[-1][1]))  # commands
        begins = not line.startswith(" ") and _begins_with_aprogram_of(line)
        if not parts or (begins and (not within or after_empty)) or (within and after_empty and line.strip()):
            parts.append((number, []))
        parts[-1][1].append(line)
        after_empty = not line.strip()
    yield from (replace(block, line=number, text="\n".join(lines).rstrip()) for number, lines in parts)


def _begins_with_aprogram_of(text: str) -> bool:
    first = next((line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")), "")
    word = next((word for word in first.split() if not re.match(r"[A-Z_]+=", word)), "")
    return program_of(word) in PROGRAMS or word.startswith("$") or re.fullmatch(r'[a-z_]+="[^"]*"', first) is not None


def program_of(word: str) -> str:
    """A program's name without the virtual environment that it is in."""
    return re.sub(r"^(\.\./)*\.venv/bin/", "", word)


@cache
def kind(block: Block) -> str:
    """`commands`, `python`, `yaml`, `file`, `picture` or `printed`; raises for anything else."""
    if block.language in ("python", "yaml", "toml"):
        return "file" if file_of(block) else block.language
    if block.language not in ("", "text", "bash", "sh", "console", "shell"):
        raise AssertionError(f"{block.where}: what is the language {block.language}?")
    if block.text.startswith("!["):
        return "picture"
    if _begins_with_aprogram_of(block.text):
        return "commands"
    if file_of(block):
        return "file"
    if block.text.lstrip().startswith(PRINTED):
        return "printed"
    if _is_python(block.text):
        return "python"
    if isinstance(_as_yaml(block.text), dict):
        return "yaml"
    raise AssertionError(
        f"{block.where}: neither commands, code nor a file; name its program in PROGRAMS of tests/documented.py, or "
        f"how it begins in PRINTED:\n{block.text}"
    )


def file_of(block: Block) -> str | None:
    """The file that a block shows, if the paragraph above it ends with the file's name and a colon."""
    found = NAMED.search(block.above)
    if found is None or _begins_with_aprogram_of(block.text):
        return None
    is_yaml = block.language == "yaml" or isinstance(_as_yaml(block.text), dict)
    return found[1] if found[1].endswith(".yaml") == is_yaml else None


def content(block: Block) -> str:
    """A block's text, with the examples that it includes."""
    return INCLUDED.sub(lambda found: (ROOT / "docs" / "examples" / found[1]).read_text(), block.text)


def make_files(page: Path, directory: Path) -> None:
    """Write the files that a page shows below `directory`, as its reader does."""
    for block in blocks(page):
        if kind(block) == "file" and (name := file_of(block)) is not None:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(content(block))


def _is_python(text: str) -> bool:
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return False
    names = (ast.Expr, ast.AnnAssign)  # such as those of a key in YAML
    return any(not isinstance(part, names) or isinstance(part.value, ast.Call) for part in body)


def _as_yaml(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


@cache
def commands(page: Path) -> tuple[Command, ...]:
    """All commands of a page: first those of its blocks, in their order, then those in its text and tables."""
    found = [command for block in blocks(page) if kind(block) == "commands" for command in _of_block(block)]
    return (*found, *_of_tables(page), *_of_text(page))


def _of_block(block: Block) -> Iterator[Command]:
    directory = ""
    variables: dict[str, str] = {}
    line = block.line
    for text in re.split(r"(?<!\\)\n", block.text):
        found = list(_of_line(text, Command(block.page, line, (), directory), variables))
        yield from found
        if len(found) == 1 and found[0].words[0] == "cd":  # `cd there && command` is one that stands by itself
            directory = str(Path(directory, found[0].words[1]))
        line += text.count("\n") + 1


def _of_line(text: str, command: Command, variables: dict[str, str]) -> Iterator[Command]:
    """The commands of one line of a shell, which may assign variables and change the directory."""
    text = re.sub(r";(?=\s)", " ;", text.replace("\\\n", " "))
    for words in _split(shlex.split(text, comments=True)):
        if len(words) == 1 and (assigned := ASSIGNED.fullmatch(words[0])):
            variables[assigned[1]] = assigned[2]
            continue
        words = [other for word in words for other in _expanded(word, variables)]
        while ASSIGNED.fullmatch(words[0]):
            words = words[1:]
        program = program_of(words[0])
        if program not in PROGRAMS:
            raise AssertionError(f"{command.where}{shlex.join(words)}: {program} is none of {', '.join(PROGRAMS)}")
        command = replace(command, words=(program, *words[1:]))
        yield command
        for within in (found[1] for word in words if (found := re.fullmatch(r"\$\((.*)\)", word))):
            yield from _of_line(within, command, variables)
        if program == "cd":
            command = replace(command, directory=str(Path(command.directory, words[1])))


def _expanded(word: str, variables: dict[str, str]) -> list[str]:
    return shlex.split(variables[word[1:]]) if re.fullmatch(r"\$\w+", word) else [word]


def _split(words: Sequence[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for word in [*words, ";"]:
        if word not in ("&&", "|", ";"):
            part.append(word)
        elif part:
            yield part
            part = []


def _of_text(page: Path) -> Iterator[Command]:
    """Commands in backticks, where an ellipsis stands for anything."""
    for line, span in spans(page):
        if program_of(span.split()[0]) in PROGRAMS and " " in span:
            words = [word for word in span.split() if word != "..."]
            if not is_mention(words):
                yield from _of_line(" ".join(words), Command(page, line, ()), {})


def is_mention(words: Sequence[str]) -> bool:
    """Whether words name a command rather than say what to type."""
    shortest = 4 if list(words[:2]) == ["python", "-m"] else 3 if words[0] == "morphtrain" else 2
    return len(words) < shortest


def spans(page: Path) -> list[tuple[int, str]]:
    """What stands in backticks outside of blocks, with the number of its line; it may go over the end of a line."""
    lines = page.read_text().splitlines()
    for block in _whole_blocks(page):
        rows = block.text.count("\n") + (3 if block.language else 1)
        for at in range(block.line - 1, min(block.line - 1 + rows, len(lines))):
            lines[at] = ""
    text = "\n".join(lines)
    return [(text.count("\n", 0, found.start()) + 1, " ".join(found[1].split())) for found in SPAN.finditer(text)]


def _of_tables(page: Path) -> Iterator[Command]:
    """Commands in tables of which a column's head says what its cells are added to."""
    column, beginning = 0, ""
    for line, text in enumerate(page.read_text().splitlines(), start=1):
        cells = [cell.strip() for cell in text.strip().strip("|").split(" | ")] if text.startswith("|") else []
        heads = [(place, found[1]) for place, cell in enumerate(cells) if (found := ADD_TO.search(cell))]
        if heads:
            ((column, beginning),) = heads
        elif not cells:
            beginning = ""
        elif beginning and len(cells) > column and (added := re.match(r"`([^`]+)`", cells[column])):
            yield from _of_line(f"{beginning} {added[1]}", Command(page, line, ()), {})
