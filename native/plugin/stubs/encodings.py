# ruff: noqa: ANN001, ANN201, D100, D101, D103
# Stands in for encodings and codecs: only UTF-8 can be looked up, and CPython looks it up when it starts. (str.encode
# and bytes.decode do UTF-8, ASCII, Latin-1 and UTF-16 in C without asking here.)
from _codecs import register, utf_8_decode, utf_8_encode


class CodecInfo(tuple):
    name = "utf-8"
    _is_text_encoding = True


def search(name):
    return UTF_8 if name in ("utf-8", "utf_8", "utf8") else None


UTF_8 = CodecInfo((utf_8_encode, utf_8_decode, None, None))
register(search)
