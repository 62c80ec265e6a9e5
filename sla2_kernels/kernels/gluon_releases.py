"""The Triton releases whose Gluon the kernels in Gluon are known to compile with. Imports without Gluon."""

import functools

from ..support import is_tested_triton

# names in Gluon still change from one to the next
GLUON_RELEASES = ((3, 6), (3, 7), (3, 8), (3, 9))


@functools.cache
def gluon_is_known():
    """Whether the installed Triton is one of GLUON_RELEASES."""
    return is_tested_triton(GLUON_RELEASES)
