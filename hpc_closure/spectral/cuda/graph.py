"""Record work on a CUDA device once, and replay it with one launch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from hpc_closure.spectral.switches import pinning

Work = Callable[[], None]


@contextmanager
def recording() -> Iterator[None]:
    """Keep other threads from disturbing a recording; restore the stream when it fails."""
    with pinning:
        stream = torch.cuda.current_stream()
        try:
            yield
        except BaseException:
            torch.cuda.set_stream(stream)
            raise


def record(run: Work, warm: Work, device: torch.device) -> Work:
    """Record ``run()`` on a CUDA device; return the function that replays it.

    ``warm()`` runs twice before: it compiles kernels, makes transform plans and work arrays, and
    copies constants to the device.
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
