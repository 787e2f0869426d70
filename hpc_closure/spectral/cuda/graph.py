"""CUDA graphs: what is launched a thousand times, recorded and launched once."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Work = Callable[[], None]

#: to be held by a thread that allocates pinned memory: that would spoil a recording of another
pinning = threading.RLock()


@contextmanager
def recording() -> Iterator[None]:
    """Around a recording: nothing disturbs it, and where it fails the stream is as before."""
    with pinning:
        stream = torch.cuda.current_stream()
        try:
            yield
        except BaseException:
            torch.cuda.set_stream(stream)
            raise


def record(run: Work, warm: Work, device: torch.device) -> Work:
    """What replays ``run()`` on a CUDA device.

    ``warm()`` comes before, twice: it compiles kernels, makes transform plans and work arrays, and
    brings to the device what is brought once.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            warm()
            warm()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with recording(), torch.cuda.graph(graph):
            run()
    return graph.replay
