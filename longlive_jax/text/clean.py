"""Cleaning of prompts before the tokenizer (`wan/modules/tokenizers.py`, clean="whitespace").

Upstream runs `ftfy.fix_text`, unescapes HTML twice and collapses white space. We do the same
without ftfy, which differs in one thing: of text decoded with the wrong encoding we repair what
UTF-8 read as Windows-1252 or Latin-1 makes of Western letters, punctuation and emoji ("CafÃ©",
"â€“", "ðŸ˜€"). ftfy guesses at more alphabets and encodings, and at damaged sequences.

The result is in NFC. Compatibility characters are not folded (NFKC) except full-width and
half-width forms and Latin ligatures, which upstream folds too; the tokenizer's own normaliser does
the rest.
"""

from __future__ import annotations

import html
import re
import unicodedata


def clean(text: str) -> str:
    """The prompt as the tokenizer should see it."""
    text = html.unescape(html.unescape(fix(text)))
    return " ".join(text.split())


def fix(text: str) -> str:
    """Repairs encoding, quotes, ligatures, character widths and control characters; ends in NFC."""
    text = html.unescape(text) if "<" not in text else text
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = _MOJIBAKE.sub(_decode, text.translate(_FROM_C1))
    text = _TERMINAL.sub("", text).translate(_REPLACE)
    return unicodedata.normalize("NFC", text)


def _windows_1252(byte: int) -> str:
    """The character of a byte; the five that Windows-1252 leaves out are control characters."""
    try:
        return bytes([byte]).decode("cp1252")
    except UnicodeDecodeError:
        return chr(byte)


_BYTES = {_windows_1252(byte): byte for byte in range(0x80, 0x100)}
_FROM_C1 = {byte: _windows_1252(byte) for byte in range(0x80, 0xA0)}
_TAIL = "[" + "".join(re.escape(_windows_1252(byte)) for byte in range(0x80, 0xC0)) + "]"
# Only lead bytes that are rare before such characters in real text: not é, which "café’”" has.
_MOJIBAKE = re.compile(f"Â[\xa0-\xbf]|Ã{_TAIL}|â{_TAIL}{{2}}|ð{_TAIL}{{3}}")


def _decode(match: re.Match[str]) -> str:
    try:
        return bytes(_BYTES[char] for char in match[0]).decode("utf-8")
    except UnicodeDecodeError:
        return match[0]


_TERMINAL = re.compile(r"\x1b\[[\d;]*[a-zA-Z]")


def _replacements() -> dict[int, str]:
    """Single characters and what becomes of them, as ftfy has it."""
    table = {code: "" for code in (*range(0x09), 0x0B, *range(0x0E, 0x20), 0x7F, 0xFEFF)}
    table |= {code: "" for code in (*range(0x206A, 0x2070), *range(0xFFF9, 0xFFFD))}
    table |= {code: "'" for code in (0x02BC, *range(0x2018, 0x201C))}
    table |= {code: '"' for code in range(0x201C, 0x2020)}
    widths = (0x3000, *range(0xFF01, 0xFFF0))
    ligatures = (0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4))
    for code in (*widths, *ligatures, *range(0xFB00, 0xFB07)):
        table[code] = unicodedata.normalize("NFKC", chr(code))
    return table | {0x149: "'n"}


_REPLACE = _replacements()
