"""What of a process is told mapping by mapping, see tests/support/host_memory.py."""

import host_memory
import pytest

SMAPS = """\
55d0c8a00000-55d0c8b00000 rw-p 00000000 00:00 0                          [heap]
Size:               1024 kB
Rss:                 700 kB
Anonymous:           700 kB
VmFlags: rd wr mr mw me ac
7f10e4000000-7f10e7fff000 rw-p 00000000 00:00 0
Rss:               50000 kB
Anonymous:         50000 kB
7f10e8000000-7f10e9000000 rw-p 00000000 00:00 0
Rss:               10000 kB
Anonymous:         10000 kB
7f10f0800000-7f10f2000000 rw-p 00000000 00:00 0
Rss:               24000 kB
Anonymous:         24000 kB
7f1200000000-7f1300000000 rw-p 00000000 103:01 42  /models/a b.safetensors
Rss:              900000 kB
Anonymous:           300 kB
7f1400000000-7f1500000000 rw-s 00000000 00:01 7    /dev/zero (deleted)
Rss:              200000 kB
Anonymous:             0 kB
"""


def test_files_count_where_they_were_written_to():
    assert host_memory.by_name(SMAPS) == {
        "[heap]": 700 << 10,
        "[heaps of threads]": 60000 << 10,
        "unnamed, up to 32 MB": 24000 << 10,
        "/models/a b.safetensors": 300 << 10,
        "/dev/zero (deleted)": 200000 << 10,
    }


@pytest.mark.skipif(not host_memory.SMAPS.exists(), reason="Linux tells")
def test_mappings_of_this_process():
    host_memory.trim()
    before = sum(host_memory.mappings().values())
    taken = bytearray(b"x") * (128 << 20)
    # In all: the system joins a mapping with its neighbours. Reading them took 11 MB once.
    more = sum(host_memory.mappings().values()) - before
    assert more == pytest.approx(len(taken), abs=64 << 20)
