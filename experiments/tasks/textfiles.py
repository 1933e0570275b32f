"""Text from files and data sets: uncompressed, decoded, with the line ends of Unix."""

import bz2
import gzip
import io
import lzma
import pathlib
from collections.abc import Callable

_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


def plain_name(name: str) -> str:
    """The name of a file without its suffix of compression: 'train.de' of 'train.de.gz'."""
    return next((name.removesuffix(end) for end in _SUFFIXES if name.endswith(end)), name)


def read(file: pathlib.Path) -> str:
    """The text of a file, plain or compressed by gzip, bzip2, xz or Zstandard, whatever its name.

    Raises:
      ValueError: it is not UTF-8 text; says what it is.  Or it is compressed by Zstandard and
        nothing that reads it is installed.
      OSError: it cannot be read, is damaged, or is not compressed although its name says so.
    """
    try:
        data = packed = file.read_bytes()
        while decompress := _decompressor(data):
            data = decompress(data)
    except ImportError as error:
        raise ValueError(
            f"{file} is compressed by Zstandard, which this Python cannot read: pip install "
            "zstandard, or unpack it (zstd -d)"
        ) from error
    except Exception as error:  # every format has exceptions of its own for a damaged file
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot read the text file {file}: {reason}") from error
    if data and data is packed and plain_name(file.name) != file.name:
        raise OSError(
            f"cannot read the text file {file}: it is not compressed, although named "
            f"{file.suffix}: rename it, or get it anew"
        )
    return decode(data, str(file))


def decode(data: bytes, name: str) -> str:
    """The text of UTF-8 bytes, without a byte-order mark; `name` is what messages call it.

    Lines end at "\\n": "\\r\\n" becomes that, and "\\r" where there is no "\\n" at all.  In a text
    with "\\n" a single "\\r" is part of a line: else one side of a parallel text could have a line
    more.

    Raises:
      ValueError: it is not UTF-8 text, or holds NUL; says what it is, or where that begins.
    """
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
        fault = data.find(0)
    except UnicodeDecodeError as error:
        fault = error.start
    if fault < 0:
        return text.replace("\r\n", "\n") if "\n" in text else text.replace("\r", "\n")
    if kind := _kind(data):
        raise ValueError(f"{name} is {kind}, not UTF-8 text: convert it, or leave it out")
    line = 1 + data.count(b"\n", 0, fault)
    what = "is not UTF-8 text" if data[fault] else "holds NUL, as binary files and UTF-16 do"
    raise ValueError(
        f"{name}:{line} {what} (byte {fault} of the whole): convert it, or leave it out"
    )


def lines(text: str) -> list[str]:
    """The lines of a text from `decode`, without white space at their ends.

    Not str.splitlines: U+2028, form feed and others are part of a sentence, and would shift one
    side of a parallel text only.
    """
    return [line.strip() for line in text.removesuffix("\n").split("\n")] if text else []


# By their first bytes, UTF-32 before UTF-16, whose mark begins as its own.
_KINDS = {
    b"\xff\xfe\x00\x00": "UTF-32 text",
    b"\x00\x00\xfe\xff": "UTF-32 text",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"%PDF-": "a PDF document",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"PK\x03\x04": "a zip archive or a document in one",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"PAR1": "a Parquet file",
    b"SQLite format": "an SQLite database",
    b"\x7fELF": "a program",
}


def _kind(data):
    if data[257:262] == b"ustar":
        return "a tar archive"
    return next((kind for start, kind in _KINDS.items() if data.startswith(start)), None)


def _zstandard(data):
    try:
        from compression import zstd  # Python 3.14 and later
    except ImportError:
        import zstandard

        decompressor = zstandard.ZstdDecompressor()
        return decompressor.stream_reader(io.BytesIO(data), read_across_frames=True).read()
    return zstd.decompress(data)


_DECOMPRESSORS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    **{
        b"BZh%d%b" % (level, start): bz2.decompress
        for level in range(1, 10)
        for start in (b"1AY&SY", b"\x17rE8P\x90")  # of a block, and of the end of an empty file
    },
    b"\xfd7zXZ\x00": lzma.decompress,
    b"\x28\xb5\x2f\xfd": _zstandard,
}


def _decompressor(data):
    return next((way for start, way in _DECOMPRESSORS.items() if data.startswith(start)), None)
