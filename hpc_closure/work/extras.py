"""Packages that only some commands need, and the extra of this package that installs each.

A plain ``pip install hpc_closure`` brings what the closure, the solver and three verbs need. The
other packages are imported where they are used, and a command that lacks one says so in a line::

    hpc-closure: evaluate needs pandas, which is not installed: pip install 'hpc_closure[report]'

Only the standard library is imported.
"""

import importlib.util

#: extra -> modules of the packages that it installs, as setup.cfg lists them
EXTRAS = {
    "hpc": ("mpi4py", "submitit"),
    "report": ("matplotlib", "pandas", "jinja2", "tensorboard"),
    "data": ("zarr", "netCDF4"),
    "deepspeed": ("deepspeed",),
}
EVALUATE = ("pandas", "matplotlib", "jinja2")  # modules without which evaluate cannot run


class MissingPackage(RuntimeError):
    """A package that a command needs is not installed; the message is one line."""


def installed(module: str) -> bool:
    """Return whether a top-level module can be found; nothing is imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a module that removed or replaced its own description
        return False


def command(*modules: str) -> str:
    """Return the pip command that installs these modules, ``pip install 'hpc_closure[...]'``."""
    names = [extra for extra, ours in EXTRAS.items() if set(ours) & set(modules)]
    return f"pip install 'hpc_closure[{','.join(names)}]'" if names else "pip install hpc_closure"


def need(who: str, *modules: str) -> None:
    """Check that modules are installed.

    Args:
        who: command that needs them, for the message.
        modules: top-level names.

    Raises:
        MissingPackage: some are not installed; the message has the pip command.
    """
    absent = [module for module in modules if not installed(module)]
    if absent:
        verb = "are" if len(absent) > 1 else "is"
        raise MissingPackage(
            f"{who} needs {', '.join(absent)}, which {verb} not installed: {command(*absent)}"
        )


def explain(error: ImportError) -> str:
    """Describe a failed import in one line that says what to do."""
    module = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and module:
        return f"this command needs {module}, which is not installed: {command(module)}"
    return f"{error}; `hpc-closure doctor` lists what is broken and how to mend it"
