"""Text that people wrote: files in any Unicode encoding, tables, one text out of a value, and names that are safe to print."""

import codecs
import csv
import io
import json
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from unicodedata import category

from ..reading import ReadError, reason
from ..reading import json_of as parsed_json

LONGEST = (
    20_000  # characters of one text: encoders read some hundred words, so more is a file that was taken for a line
)
COLUMNS = ("prompt", "caption", "text")
LINE = re.compile(
    r"\r\n|\n"
)  # `str.splitlines` also ends a line at U+2028, form feeds and others that are part of a text
WORD, BROKEN = re.compile(r"\w"), re.compile("[\0\ud800-\udfff]")
MARKS = (  # byte order marks; UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@dataclass(frozen=True)
class Found:
    """What a source gave: `count` of `what`, and in how many cases of which kind, zeros included."""

    source: str
    count: int
    what: str
    cases: Mapping[str, int]

    @property
    def line(self) -> str:
        """`1,024 pictures in SOURCE: captions 812 of metadata.jsonl, 3 of .txt, 0 by name, 12 empty`, for a person to check."""
        said = ", ".join(f"{n:,} {printable(kind)}" for kind, n in self.cases.items())
        what = self.what.removesuffix("s") if self.count == 1 else self.what
        return f"{self.count:,} {what} in {printable(self.source)}" + (f": {said}" if said else "")


def printable(text: object) -> str:
    """A name as one line that does nothing to a terminal: what is no printable character is shown by its code."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def require_regular(path: Path, option: str, cure: str) -> Path:
    """The path, if a regular file is there; a pipe would hang its reader. Raises ValueError with one line that ends in the `cure`."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{option}: cannot read {printable(path)} ({reason}); {cure}") from error
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe or a device"
        raise ValueError(f"{option}: {printable(path)} is a {kind}, not a file; {cure}")
    return path


def read_text(path: Path, option: str, cure: str) -> str:
    """The text of a file. Raises ValueError as `require_regular` and `decoded` do."""
    try:
        return decoded(require_regular(path, option, cure).read_bytes(), f"{option}: {printable(path)}")
    except OSError as error:
        raise ValueError(f"{option}: cannot read {printable(path)} ({error.strerror}); {cure}") from error


def decoded(data: bytes, where: str) -> str:
    """Bytes of a text as their byte order mark says, else UTF-8. Raises ValueError that begins with `where`."""
    mark, encoding = next(((m, e) for m, e in MARKS if data.startswith(m)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise ReadError(
            f"{where} is not {encoding.upper().removesuffix('-LE').removesuffix('-BE')} text (byte {len(mark) + error.start}); save it as UTF-8"
        ) from error
    if "\0" in text:
        raise ReadError(f"{where} has zero bytes in it (it is no text, or UTF-16 without its mark); save it as UTF-8")
    return text


def lines(text: str, where: str) -> Iterator[tuple[int, str]]:
    r"""(number from 1, line) of a text whose lines end in \n or \r\n alone. Raises ValueError for a lone \r, as old programs end lines."""
    for number, line in enumerate(LINE.split(text), 1):
        if "\r" in line:
            raise ValueError(
                f"{where}, line {number} has a carriage return in it; save the file with line feeds at the ends of lines"
            )
        yield number, line


def text_of(value: object, where: str) -> str:
    """A value as the text that it is, stripped, empty where it is null or nothing of it can be seen.

    Raises ValueError, beginning with `where`, for all that would have to be turned into text first (numbers, lists), for halves of
    characters, zero bytes and texts above `LONGEST`.
    """
    if value is None or (isinstance(value, float) and value != value):  # what pandas writes for null
        return ""
    if not isinstance(value, str):
        kind = (
            "a list"
            if isinstance(value, list)
            else "an object"
            if isinstance(value, Mapping)
            else f"{json.dumps(value)}"
        )
        raise ValueError(f'{where} has {kind} where a text belongs; write one text in quotes, such as "a red cat"')
    text = value.replace("\ufeff", "").strip()
    if len(text) > LONGEST:
        raise ValueError(
            f"{where} has a text of {len(text):,} characters, allowed are {LONGEST:,}; check where its lines end"
        )
    if BROKEN.search(text):
        raise ValueError(
            f"{where} has half a character or a zero byte in its text ({printable(text)[:60]}); write it again"
        )
    visible = WORD.search(text) or any(category(c)[0] != "Z" and category(c) not in ("Cc", "Cf") for c in text)
    return text if visible else ""


def json_of(text: str, where: str) -> object:
    """A JSON value. Raises ValueError that begins with `where`."""
    try:
        return parsed_json(text)
    except Exception as error:  # as many types as there are kinds of damage
        raise ValueError(f"{where} is not JSON ({reason(error)}); correct it") from error


def json_lines(text: str, where: str) -> Iterator[tuple[str, object]]:
    """(where, value) of every line of JSON that is not blank."""
    for number, line in enumerate(LINE.split(text), 1):
        if line.strip():
            here = f"{where}, line {number}"
            yield here, json_of(line, here)


def table(text: str, delimiter: str, where: str) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """(names of the columns, (where, row) of every row that is not blank) of CSV with a header row.

    Quotes are read strictly, so that one that is never closed does not swallow the rest. A row may be short, not long: what stands behind
    the last column is a text with an unquoted delimiter. Raises ValueError that begins with `where`.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    rows: list[tuple[str, dict[str, str]]] = []
    begin = 1
    try:
        for cells in reader:
            here, begin = f"{where}, line {begin}", reader.line_num + 1
            if not any(c.strip() for c in cells):
                continue
            if names is None:
                names = [c.strip() for c in cells]
                if twice := [n for n in names if n and names.count(n) > 1]:
                    raise ValueError(f"{where} has two columns {printable(twice[0])}; rename one")
                continue
            if len(cells) > len(names):
                raise ValueError(
                    f"{here} has {len(cells)} columns, its header {len(names)}; put texts with a {delimiter!r} in them into quotes"
                )
            rows.append((here, dict(zip(names, cells, strict=False))))
    except csv.Error as error:
        raise ValueError(
            f"{where}, line {begin}: {error} (a quote that is not closed, or not doubled?); correct it"
        ) from error
    return names or [], rows
