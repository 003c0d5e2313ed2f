"""Where the records of a zip archive lie in it, for archives that are not compressed.

torch.save compresses nothing, so every record of a .pth file can be mapped where it is. The
directory is read here within limits of its own: Python's zipfile has none, nor has torch.
(Format: PKWARE's APPNOTE.TXT, 4.3 to 4.5.)
"""

import struct

from .error import CheckpointError, damaged, shown

END = struct.Struct("<4s4H2LH")  # of the archive
END_64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR_64 = struct.Struct("<4sLQL")  # of END_64, just before END
ENTRY = struct.Struct("<4s6H3L5H2L")  # of the directory
LOCAL = struct.Struct("<4s5H3L2H")  # before each record

LONGEST_COMMENT = 2**16
MOST_RECORDS = 2**15
LARGEST_DIRECTORY = 2**23  # bytes, 256 for each of so many records
IN_64 = 0xFFFFFFFF  # in place of a number that needs 64 bits


def stored_records(data: bytes) -> dict[str, range]:
    """The bytes of every record, by its name.

    Args:
        data: the whole archive; anything that can be indexed as bytes can, as mmap does.

    Raises:
        CheckpointError: cut short, damaged, in several files, compressed, or of too many records.
    """
    count, start = _directory(data)
    records, at = {}, start
    for _ in range(count):
        name, place, at = _entry(data, at)
        if at - start > LARGEST_DIRECTORY:
            raise damaged(f"a zip directory of more than {LARGEST_DIRECTORY} bytes")
        if name in records:
            raise damaged(f"two records {shown(name, 60)}")
        records[name] = place
    return records


def _unpacked(layout: struct.Struct, data: bytes, at: int) -> tuple:
    if at + layout.size > len(data):
        raise damaged("a zip directory that points behind the file")
    return layout.unpack_from(data, at)


def _directory(data: bytes) -> tuple[int, int]:
    """How many entries the directory has, and where it starts."""
    end = data.rfind(b"PK\x05\x06", max(0, len(data) - END.size - LONGEST_COMMENT))
    if end < 0:
        raise CheckpointError(
            f"is truncated: {len(data)} bytes without the zip directory that ends a complete .pth "
            "file. Download it again"
        )
    _, disk, _, _, count, _, start, _ = _unpacked(END, data, end)
    locator = end - LOCATOR_64.size
    if locator >= 0 and data[locator : locator + 4] == b"PK\x06\x07":
        _, disk, end_64, disks = _unpacked(LOCATOR_64, data, locator)
        disk += disks != 1
        count, _, start = _unpacked(END_64, data, end_64)[-3:]
    if disk:
        raise damaged("a zip archive in several files")
    if count > MOST_RECORDS:
        raise damaged(f"{count} records, more than any model has")
    return count, start


def _entry(data: bytes, at: int) -> tuple[str, range, int]:
    """Name and bytes of the record whose directory entry is at `at`, and where the next one is."""
    fields = _unpacked(ENTRY, data, at)
    magic, flags, method = fields[0], fields[3], fields[4]
    packed, size, name_length, extra_length, comment_length = fields[8:13]
    name_end = at + ENTRY.size + name_length
    name = bytes(data[at + ENTRY.size : name_end]).decode("utf-8", "replace")
    extra = bytes(data[name_end : name_end + extra_length])
    size, packed, header = _wide(extra, size, packed, fields[-1])
    if magic != b"PK\x01\x02":
        raise damaged("a zip directory that is none")
    if method or flags & 1 or packed != size:
        raise CheckpointError(
            f"has a compressed or encrypted record ({shown(name, 60)}), which torch.save does not "
            "write: save the state dict with torch.save"
        )
    return name, _place(data, header, size, name), name_end + extra_length + comment_length


def _wide(extra: bytes, *numbers: int) -> list[int]:
    """`numbers`, those that need 64 bits from the extra field, which has them in this order."""
    wide, at = [], 0
    while at + 4 <= len(extra) and not wide:
        kind, length = struct.unpack_from("<2H", extra, at)
        field = extra[at + 4 : at + 4 + length]
        if kind == 1:
            wide = [n for (n,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])]
        at += 4 + length
    return [wide.pop(0) if n == IN_64 and wide else n for n in numbers]


def _place(data: bytes, header: int, size: int, name: str) -> range:
    magic, *_, name_length, extra_length = _unpacked(LOCAL, data, header)
    start = header + LOCAL.size + name_length + extra_length
    if magic != b"PK\x03\x04" or start + size > len(data):
        raise damaged(f"record {shown(name, 60)} is not where the zip directory says")
    return range(start, start + size)
