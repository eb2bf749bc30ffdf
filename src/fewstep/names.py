"""Names of files and runs.

Which names are allowed, how a name is made from any text, and how a name is shown on a terminal.
"""

import hashlib
import os
import re
import shlex
import unicodedata
from pathlib import Path

LONGEST = 100  # bytes of a name: leaves room for endings where a file system allows 143 (eCryptfs) and not 255
# Names of devices on Windows.
RESERVED = re.compile(r"(?:con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(?:\..*)?", re.IGNORECASE | re.DOTALL)
SEPARATORS = frozenset('/\\<>:"|?*')  # characters with a meaning on some file system
# Characters that change the order in which text is read.
TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
ALLOWED = "one folder's name: letters, digits, spaces, dots, - and _, with a letter or digit in it"


def fault_of(name: object) -> str:
    """Say why some system does not allow `name` for a file.

    Empty for an allowed name.
    """
    if not isinstance(name, str):
        return f"is a {type(name).__name__}"
    if not name.strip(". "):
        return "has nothing but dots and spaces"
    if odd := next((c for c in name if c in SEPARATORS or not _printable(c)), ""):
        return f"has {visible(odd, lines=False)!r} in it"
    if name != name.strip() or name.endswith("."):
        return "begins or ends with a space, or ends with a dot"
    if RESERVED.fullmatch(name):
        return "is a device on Windows"
    size = len(os.fsencode(name)) if _encodable(name) else len(name.encode())
    return f"has {size} bytes, more than {LONGEST}" if size > LONGEST else ""


def require_path(value: object, option: str) -> Path:
    """Return a path that somebody passed.

    Raises ValueError for an empty one, which would be the current folder, for bytes, and for what is no path.
    """
    if not isinstance(value, str | Path) or not str(value).strip() or "\0" in str(value):
        shown = str(value) if isinstance(value, Path) else repr(value)
        if "\n" in shown:  # a tensor, an array
            shown = f"a value of the type {type(value).__name__}"
        raise ValueError(f"{option}: got {shown}, allowed is the path of a folder as text")
    return Path(value)


def require_name(name: object, option: str, cure: str = "choose another") -> str:
    """Return `name` if a file may have it.

    Raises ValueError with one line that names the `option`.
    """
    if fault := fault_of(name):
        raise ValueError(
            f"{option}: got {visible(repr(name)[:160], lines=False)}, which {fault}; allowed is {ALLOWED}; {cure}"
        )
    return str(name)


def read_name(name: object, option: str) -> str:
    """Return a name from a file, as one that files may have.

    Raises ValueError for a text that is no name, and for one that leads elsewhere.
    """
    if not isinstance(name, str) or not name.strip(". ") or any(c in "/\\" or not _printable(c) for c in name):
        return require_name(name, option, "do not use this file unless you trust who made it")
    return made_name(name)


def made_name(text: str, ending: str = "", longest: int = LONGEST) -> str:
    """Make a name from any text.

    `_` replaces what no file system takes. A name of more than `longest` bytes is shortened, with a hash to
    distinguish it. `ending` follows the name, whole. A text that is a name already comes back unchanged.
    """
    text = as_text(text)
    plain = "".join("_" if c in SEPARATORS or not _printable(c) else c for c in text).strip().rstrip(". ") or "unnamed"
    plain = f"_{plain}" if RESERVED.fullmatch(plain) or not plain.strip(". ") else plain
    if not _encodable(plain):  # in a locale without these letters
        plain = "".join(c if c.isascii() else "_" for c in plain)
    if len(os.fsencode(plain)) > longest:
        told = "-" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        while plain and len(os.fsencode(plain)) + len(told) > longest:
            plain = plain[:-1]
        plain = plain.rstrip(". ") + told
    return plain + ending


def expanded(text: str) -> str:
    """Return a path as this system spells it.

    `~` is the home folder, which a shell leaves alone behind `=`, unless a file has this name. Letters that
    the locale lacks stand for their bytes.
    """
    text = text if _encodable(text) else os.fsdecode(text.encode("utf-8", "surrogateescape"))
    return os.path.expanduser(text) if text.startswith("~") and not os.path.lexists(text) else text


def visible(text: str, lines: bool = True) -> str:
    """Return `text` with control characters written out, such as `\\x1b`.

    Control characters are those that a terminal would obey or could not show. Line breaks and tabs stay with
    `lines`.
    """
    kept = "\n\t" if lines else ""
    return "".join(c if c in kept or _printable(c) else _written(c) for c in text)


def quoted(*arguments: str | Path) -> str:
    """Return a command to copy into a shell.

    Every argument is quoted as needed, control characters as bash's `$'\\x1b'`.
    """
    return " ".join(_quoted(str(argument)) for argument in arguments)


def _quoted(argument: str) -> str:
    if all(_printable(c) for c in argument):
        return shlex.quote(argument)
    escaped = argument.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(c if _printable(c) else "".join(f"\\x{b:02x}" for b in _bytes(c)) for c in escaped) + "'"


def _printable(character: str) -> bool:
    """Return whether a terminal shows a character and does nothing else.

    Joiners and selectors within emoji and scripts are shown.
    """
    return unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp") and character not in TURNING


def _written(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file's name that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(character) or (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    )


def _bytes(character: str) -> bytes:
    return os.fsencode(character) if _encodable(character) else character.encode("utf-8", "surrogatepass")


def as_text(text: str) -> str:
    """Return the letters of a text read in a locale without them."""
    try:
        return os.fsencode(text).decode("utf-8", "replace")
    except UnicodeEncodeError:
        return text


def _encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True
