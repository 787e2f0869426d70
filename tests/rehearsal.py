"""A device without the device: shapes, types and places of a CUDA run, on a machine without one.

Tensors on ``DEVICE`` are fake (they have no numbers), those of the host are real. So an operation
that mixes both is refused, as on a device, and so is a look at a number that only a device knows:
each such look would make the host wait for it.
"""

import ctypes
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

DEVICE = "cuda:0"
# code that is off by default, and may be deleted
CUDA_FOLDERS = tuple(f"hpc_closure.{wing}.cuda" for wing in ("spectral", "closure", "train"))
# places of the devices in c10::DeviceType
CUDA, META, NUMBER = 1, 14, 22
REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"


class Rehearsal(TorchDispatchMode):
    """Inside it, tensors made on or moved to ``DEVICE`` are fake.

    A build without CUDA has nobody who switches devices and refuses to move tensors for that;
    that of the meta device, which does nothing, stands in.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        self.switches = (ctypes.c_void_p * NUMBER).in_dll(library, REGISTRY)

    def __enter__(self):
        self.before = self.switches[CUDA], torch.cuda._lazy_init
        self.switches[CUDA] = self.switches[META]
        torch.cuda._lazy_init = lambda: None
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=DEVICE) comes here
        return super().__enter__()

    def __exit__(self, *raised):
        self.switches[CUDA], torch.cuda._lazy_init = self.before
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*raised)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(on_device(leaf) for leaf in tree_leaves((args, kwargs))):
            with self.fake:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    @contextmanager
    def off(self):
        """For a while everything is real."""
        with _disable_current_modes():
            yield


def on_device(leaf) -> bool:
    """Whether it is a tensor there, or the device."""
    return isinstance(leaf, FakeTensor) or isinstance(leaf, torch.device) and leaf.type == "cuda"


def move(module: torch.nn.Module) -> torch.nn.Module:
    """The module on ``DEVICE``."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return module.to(DEVICE)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


class _Deleted:
    """Finds no module of the folders."""

    def find_spec(self, name, path=None, target=None):
        if name.startswith(CUDA_FOLDERS):
            raise ModuleNotFoundError(f"{name} is deleted", name=name)


@contextmanager
def without_cuda_folders():
    """Let nothing import the folders of GPU code, as if they were deleted."""
    names = [name for name in sys.modules if name.startswith(CUDA_FOLDERS)]
    loaded, finder = {name: sys.modules.pop(name) for name in names}, _Deleted()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.modules.update(loaded)
