"""The kernels, one a file; importing this imports all files, and so registers every kernel."""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
