"""How the process's allocator treats large tensors on CPU. Never imports torch."""

import ctypes

_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -4, -1, -2  # of mallopt(3)


def keep_memory() -> bool:
    """Let glibc's malloc keep what is freed, so that the next layer's tensors take the same pages; whether it did.

    Without it every tensor above 32 MB is mapped anew and its pages are cleared by the kernel: of a scoring pass over
    12,000 tokens that took a quarter (benchmarks/LOG.md, 12). The process stays as large as it once was, which is a
    choice for programs: the command line makes it, the library does not. False where malloc is another.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 * 2**20))
    return all(mallopt(name, value) == 1 for name, value in settings)
