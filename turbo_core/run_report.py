"""What really ran during one sampler run, collected while it runs and told in one log line."""

import collections
import contextlib
import contextvars
import logging

from ..kernels import dispatch
from .words import count

log = logging.getLogger(__name__)

GRANULARITY = {"blocks": "exact (128x128 blocks)", "rows": "fast (per token and channel)"}


class Counts:
    """Counts of one model in one sampler run; see `text` for what they mean."""

    def __init__(self):
        self.forwards = 0
        self.replayed = 0  # of them, as a CUDA graph
        self.no_graph = set()  # why there was none, where one would pay
        self.num_blocks = 0
        self.sla = collections.defaultdict(set)  # how -> blocks
        self.dense = collections.defaultdict(set)  # why -> blocks
        self.fused = set()
        self.unfused = collections.defaultdict(set)  # why -> blocks
        self.int8 = collections.defaultdict(set)  # granularity -> linears
        self.gpus = set()  # "on 2 GPUs", or on one, and why
        self.kernels = set()  # what `dispatch.choose` tells: (op, name, why)
        self.streamed = 0  # bytes of weights that came to the GPU to be used
        self.ran_out = 0  # operations that found no memory until torch's cache was given back
        self.given_back = 0  # bytes of it, then
        self.waits = []  # (start, end) of waiting for them, as events with elapsed_time

    def text(self) -> str:
        """One sentence: forward passes, SLA coverage, every step-aside, INT8, kernels."""
        if not self.forwards:
            return "runs without TurboDiffusion"
        sparse = set().union(*self.sla.values())
        parts = [count(self.forwards, "forward pass", "forward passes"), *sorted(self.gpus)]
        parts += [f"{self.replayed} of them as a CUDA graph"] if self.replayed else []
        parts += [f"no CUDA graph: {why}" for why in sorted(self.no_graph)]
        parts += [f"SLA in {len(sparse)} of {self.num_blocks} blocks"]
        parts += [f"{how} in {_ranges(blocks)}" for how, blocks in self.sla.items()]
        parts += [f"dense in {_ranges(blocks)}: {why}" for why, blocks in self.dense.items()]
        parts += [f"fused in {_ranges(self.fused)}"] if self.fused else []
        parts += [f"not fused in {_ranges(blocks)}: {why}" for why, blocks in self.unfused.items()]
        parts += [f"INT8 {how} in {count(len(of), 'linear')}" for how, of in self.int8.items()]
        return "; ".join(parts + self._streaming() + self._memory() + self._kernel_parts())

    def _memory(self) -> list[str]:
        """How often memory ended, and what there was then."""
        return [_ran_out(self.ran_out, self.given_back)] if self.ran_out else []

    def _streaming(self) -> list[str]:
        """How many bytes of weights were streamed, and how long the GPU waited for them."""
        if not self.streamed:
            return []
        told = f"{self.streamed / 1e9:.2f} GB of weights streamed"
        with contextlib.suppress(RuntimeError):  # a GPU that has failed tells no time
            if self.waits:
                self.waits[-1][1].synchronize()
                told += f", {sum(a.elapsed_time(b) for a, b in self.waits):.0f} ms waited for them"
        return [told]

    def add(self, other: "Counts") -> None:
        """All that `other` knows of blocks, layers and kernels."""
        for mine, its in ((self.sla, other.sla), (self.dense, other.dense),
                          (self.unfused, other.unfused), (self.int8, other.int8)):  # fmt: skip
            for key, found in its.items():
                mine[key] |= found
        self.fused |= other.fused
        self.kernels |= other.kernels

    def _kernel_parts(self) -> list[str]:
        """What the kernels were written in, and each op that a faster one could not run."""
        names, declined = set(), []
        for op, name, why in sorted(self.kernels, key=str):
            slow = name == dispatch.REFERENCE
            names.add(f"{name}, as {why}" if slow else name)
            if why and not slow:
                declined.append(f"{op} in {name}: {why}")
        return [f"kernels: {' and '.join(sorted(names))}", *declined] if names else []


class RunReport:
    """Counts of one sampler run, one set for each expert that took part in it."""

    def __init__(self):
        self.experts = collections.defaultdict(Counts)  # name -> counts
        self.expert = ""  # whose turn it is; a run of one model has no names
        self.ending = ""  # how it ended, in a few words; by itself where empty
        self.warned = set()

    @property
    def counts(self) -> Counts:
        """Those of the model that runs now."""
        return self.experts[self.expert]

    def hear(self, op: str, name: str, why: str | None) -> None:
        """`op` runs in `name`, see `dispatch.listening`; before every launch, so in one line."""
        self.experts[self.expert].kernels.add((op, name, why))

    def warn(self, sentence: str) -> None:
        """Log a warning, once in this run."""
        if sentence not in self.warned:
            self.warned.add(sentence)
            log.warning("TurboDiffusion: %s", sentence)

    def line(self) -> str:
        """What ran, expert by expert."""
        names = {name: f"{name}: " if name else "" for name in self.experts}
        told = [names[name] + counts.text() for name, counts in self.experts.items()]
        ending = f"{self.ending}, " if self.ending else ""
        return f"TurboDiffusion: {ending}{' | '.join(told)}"


_current = contextvars.ContextVar("turbodiffusion_run", default=None)


@contextlib.contextmanager
def run(cancelled: type[BaseException] = KeyboardInterrupt):
    """Collect during one sampler run and log its line at the end, whatever ends it.

    `cancelled` is what a user's cancelling raises. Inside another run it joins that one.
    """
    if (report := _current.get()) is not None:
        yield report
        return
    report = RunReport()
    token = _current.set(report)
    try:
        with dispatch.listening(report.hear):
            yield report
    except BaseException as error:
        report.ending = "cancelled" if isinstance(error, cancelled) else "ended by an error"
        raise
    finally:
        _current.reset(token)
        if any(counts.forwards for counts in report.experts.values()):
            log.info(report.line())


@contextlib.contextmanager
def noting():
    """Meanwhile what is noted goes to counts of its own, which this gives; see `note_replayed`."""
    report = RunReport()
    token = _current.set(report)
    try:
        with dispatch.listening(report.hear):
            yield report.counts
    finally:
        _current.reset(token)


def note_expert(name: str) -> None:
    """From here on the expert called `name` runs."""
    if report := _current.get():
        report.expert = name
        report.experts[name]  # told of even if nothing of ours runs in it


def _counts() -> Counts | None:
    report = _current.get()
    return None if report is None else report.counts


def note_forward(num_blocks: int) -> None:
    """A forward pass through a model of `num_blocks` transformer blocks begins."""
    if counts := _counts():
        counts.forwards += 1
        counts.num_blocks = num_blocks


def note_replayed(notes: Counts) -> None:
    """A forward pass ran as a CUDA graph, whose capturing noted this."""
    if counts := _counts():
        counts.replayed += 1
        counts.add(notes)


def note_no_graph(why: str) -> None:
    """A forward pass would run faster as a CUDA graph, but `why`."""
    if counts := _counts():
        counts.no_graph.add(why)


def note_sla(block: int, how: str) -> None:
    """Block `block` ran sparse-linear attention, `how` in a few words."""
    if counts := _counts():
        counts.sla[how].add(block)


def note_dense(block: int, why: str) -> None:
    """Block `block` ran dense attention, and `why`."""
    if counts := _counts():
        counts.dense[why].add(block)


def note_fused(block: int) -> None:
    """Block `block` ran as one fused function."""
    if counts := _counts():
        counts.fused.add(block)


def note_unfused(block: int, why: str) -> None:
    """Block `block` ran as the host's own forward, and `why`."""
    if counts := _counts():
        counts.unfused[why].add(block)


def note_gpus(how: str) -> None:
    """A forward pass was shared by GPUs, or was to be and was not, `how` and why in a few words."""
    if counts := _counts():
        counts.gpus.add(how)


def note_int8(granularity: str, linear: object) -> None:
    """The INT8 layer `linear` ran in `granularity` ("blocks" or "rows")."""
    if counts := _counts():
        counts.int8[GRANULARITY[granularity]].add(id(linear))


def note_streamed(size: int, start, end) -> None:
    """`size` bytes of weights came to the GPU, which waited from `start` to `end`: two events, or
    None where it has no clock."""
    if counts := _counts():
        counts.streamed += size
        if start is not None:
            counts.waits.append((start, end))


def note_out_of_memory(times: int, given_back: int) -> None:
    """So many operations found no memory, and were run again once torch's cache, of so many bytes
    in all, was the GPU's."""
    if counts := _counts():
        counts.ran_out += times
        counts.given_back += given_back
    else:
        log.info("TurboDiffusion: %s", _ran_out(times, given_back))


def _ran_out(times: int, given_back: int) -> str:
    told = f"memory ran out {count(times, 'time')}, went on with"
    return f"{told} {given_back / 1e9:.2f} GB of torch's cache"


def _ranges(blocks: set[int]) -> str:
    """{0, 1, 2, 7} -> "blocks 0-2, 7", {4} -> "block 4"."""
    spans = []
    for block in sorted(blocks):
        if spans and spans[-1][1] == block - 1:
            spans[-1][1] = block
        else:
            spans.append([block, block])
    many = "s" if len(blocks) > 1 else ""
    return f"block{many} " + ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
