# Stands in for encodings and codecs: UTF-8 is the only codec of this interpreter. (str.encode and bytes.decode do ASCII,
# Latin-1 and UTF-16 in C without asking here.)
from _codecs import register, utf_8_decode, utf_8_encode


class Encoder:
    def __init__(self, errors="strict"):
        self.errors = errors

    def encode(self, text, final=False):
        return utf_8_encode(text, self.errors)[0]

    def reset(self):
        pass

    def getstate(self):
        return 0

    def setstate(self, state):
        pass


class Decoder:
    def __init__(self, errors="strict"):
        self.errors = errors
        self.rest = b""

    def decode(self, data, final=False):
        text, used = utf_8_decode(self.rest + data, self.errors, final)
        self.rest = (self.rest + data)[used:]
        return text

    def reset(self):
        self.rest = b""

    def getstate(self):
        return self.rest, 0

    def setstate(self, state):
        self.rest = state[0]


class CodecInfo(tuple):
    name = "utf-8"
    _is_text_encoding = True
    incrementalencoder = Encoder
    incrementaldecoder = Decoder


def decode(data, errors="strict"):
    return utf_8_decode(data, errors, True)


UTF_8 = CodecInfo((utf_8_encode, decode, None, None))


def search(name):
    return UTF_8 if name in ("utf-8", "utf_8", "utf8") else None


register(search)
