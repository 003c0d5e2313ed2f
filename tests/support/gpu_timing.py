"""How the benchmarks time a function on a GPU."""

import statistics

import torch


def median_ms(run, runs: int, calls: int = 1) -> float:
    """Median time of one call over `runs` groups of `calls`, after two to warm up, in ms."""
    times = []
    for _ in range(runs + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times[2:])
