"""IMAGE: the modules of the live process, where they stand, and what their names and addresses mean.

The one room that adds load biases: everything it takes and gives is an address in the process now.
Names are resolved as the dynamic linker resolves them, in the order of its own lists. Where these cannot be
read: the executable, preloaded libraries, then the libraries in breadth-first order of DT_NEEDED; after these
the module's own dependencies.

Decides what a name denotes and what an address is; never writes to the process.

Specification: System V ABI, chapter 5 (shared object dependencies); ELF Handling For Thread-Local
Storage, section 3 (module numbers) and 3.4.6 (offsets from the thread pointer, variant II).
"""

from patcher.image.image import Definition, Image
from patcher.image.loaded import LoadedModule, debug_files

__all__ = [
    "Definition",
    "Image",
    "LoadedModule",
    "debug_files",
]
