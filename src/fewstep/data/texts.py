"""Texts from any source: decoding, tables, single values, printable names.

Files may be in any Unicode encoding.
"""

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

# Characters of one text. Encoders read some hundred words; a longer text is a whole file taken for a line.
LONGEST = 20_000
COLUMNS = ("prompt", "caption", "text")
# `str.splitlines` also ends a line at U+2028, form feeds and other characters that belong to a text.
LINE = re.compile(r"\r\n|\n")
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
    """What a source gave: `count` of `what`.

    `cases` counts special cases by kind, zeros included.
    """

    source: str
    count: int
    what: str
    cases: Mapping[str, int]

    @property
    def line(self) -> str:
        """The counts as one line for a person to check.

        For example `1,024 images in SOURCE: captions 812 of metadata.jsonl, 3 of .txt, 0 by name, 12
        empty`.
        """
        said = ", ".join(f"{n:,} {printable(kind)}" for kind, n in self.cases.items())
        what = self.what.removesuffix("s") if self.count == 1 else self.what
        return f"{self.count:,} {what} in {printable(self.source)}" + (f": {said}" if said else "")


def printable(text: object) -> str:
    """Return a text as one line that is safe for a terminal.

    Unprintable characters are replaced by their codes.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def require_regular(path: Path, option: str, cure: str) -> Path:
    """Check that a path is a regular file, and return the path.

    A pipe would block the reader. Raises ValueError with one line that ends with the `cure`.
    """
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
    """Return the text of a file.

    Raises ValueError as `require_regular` and `decoded` do.
    """
    try:
        return decoded(require_regular(path, option, cure).read_bytes(), f"{option}: {printable(path)}")
    except OSError as error:
        raise ValueError(f"{option}: cannot read {printable(path)} ({error.strerror}); {cure}") from error


def decoded(data: bytes, where: str) -> str:
    """Decode bytes by the byte order mark, otherwise as UTF-8.

    Raises ReadError that begins with `where`.
    """
    mark, encoding = next(((m, e) for m, e in MARKS if data.startswith(m)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise ReadError(
            f"{where} is not {encoding.upper().removesuffix('-LE').removesuffix('-BE')} text (byte "
            f"{len(mark) + error.start}); save it as UTF-8"
        ) from error
    if "\0" in text:
        raise ReadError(f"{where} has zero bytes in it (it is no text, or UTF-16 without its mark); save it as UTF-8")
    return text


def lines(text: str, where: str) -> Iterator[tuple[int, str]]:
    r"""Yield (number from 1, line) of a text.

    Lines end in \n or \r\n alone. Raises ValueError for a lone \r, the line end of old programs.
    """
    for number, line in enumerate(LINE.split(text), 1):
        if "\r" in line:
            raise ValueError(
                f"{where}, line {number} has a carriage return in it; "
                "save the file with line feeds at the ends of lines"
            )
        yield number, line


def text_of(value: object, where: str) -> str:
    """Return a value as a stripped text.

    The text is empty for null, and for a text without visible characters. Raises ValueError, beginning with
    `where`, for values that would need conversion (numbers, lists), for halves of characters, for zero bytes
    and for texts longer than `LONGEST`.
    """
    if value is None or (isinstance(value, float) and value != value):  # pandas writes NaN for null
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
    """Return a JSON value.

    Raises ValueError that begins with `where`.
    """
    try:
        return parsed_json(text)
    except Exception as error:  # as many types as there are kinds of damage
        raise ValueError(f"{where} is not JSON ({reason(error)}); correct it") from error


def json_lines(text: str, where: str) -> Iterator[tuple[str, object]]:
    """Yield (where, value) of every non-blank line of JSON."""
    for number, line in enumerate(LINE.split(text), 1):
        if line.strip():
            here = f"{where}, line {number}"
            yield here, json_of(line, here)


def table(text: str, delimiter: str, where: str) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """Read a CSV text with a header row.

    Returns (names of the columns, (where, row) of every non-blank row). Quotes are read strictly, so an
    unclosed quote does not swallow the rest. A row may be shorter than the header, not longer: a longer row
    is a text with an unquoted delimiter. Raises ValueError that begins with `where`.
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
                    f"{here} has {len(cells)} columns, its header {len(names)}; "
                    f"put texts with a {delimiter!r} in them into quotes"
                )
            rows.append((here, dict(zip(names, cells, strict=False))))
    except csv.Error as error:
        raise ValueError(
            f"{where}, line {begin}: {error} (a quote that is not closed, or not doubled?); correct it"
        ) from error
    return names or [], rows
