"""CUDA graphs: what is launched a thousand times, recorded and launched once."""

from collections.abc import Callable

import torch

Work = Callable[[], None]


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
        with torch.cuda.graph(graph):
            run()
    return graph.replay
