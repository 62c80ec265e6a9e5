"""Whether a kernel in Gluon uses the shared memory of a barrier for anything else.

To Triton's allocator a barrier of copies ends with the last wait for it, so that a sum over warps may take its place. On an H200
numbers that were written there were lost while another process had its share of the GPU. mbarrier.invalidate() at the
kernel's end keeps the place.
"""

import math
import re
import tempfile

from triton._C.libtriton import ir, nvidia, passes

GLUON = "_hopper_"  # how the names of kernels in Gluon begin
OFFSET, SIZE = re.compile(r"allocation\.offset = (\d+)"), re.compile(r"allocation\.size = (\d+)")
MEMORY = re.compile(r"memdesc<((?:\d+x)+)(\w+)")
BARRIER = "i64"  # no tile holds such numbers
BITS = re.compile(r"\d+")  # of bf16, f8E4M3FN, i64: the first number


def reused_barriers(kernel):
    """((begin, end), ...) of barriers in shared memory, in bytes, whose place something else has too. kernel: as Triton compiled it."""
    # what Triton makes of tl.dot for sm_100 ends each of its barriers with mbarrier.inval before it gives the place on
    if "mbarrier.init" not in kernel.asm["ptx"] or not kernel.name.startswith(GLUON):
        return ()
    barriers, others = [], []
    for line in _allocated(kernel.asm["ttgir"]).splitlines():
        begin, size, memory = OFFSET.search(line), SIZE.search(line), MEMORY.search(line)
        if not begin or "tt.func" in line:  # the kernel's own line has the end of all
            continue
        tile = memory if "local_alloc" in line else None
        # before 3.9 what is no tile has no size
        width = int(size[1]) if size else _bytes(*tile.groups()) if tile else 1
        place = int(begin[1]), int(begin[1]) + width
        (barriers if tile and tile[2] == BARRIER else others).append(place)
    assert barriers, "a kernel with barriers shows none of them in its allocations"
    return tuple(one for one in barriers if any(one[0] < end and begin < one[1] for begin, end in others))


def _bytes(shape, dtype):
    return math.prod(map(int, shape.split("x")[:-1])) * int(BITS.search(dtype)[0]) // 8


def _allocated(ttgir):
    """The kernel's intermediate form with places in shared memory: the compiler's passes up to the one that gives them."""
    context = ir.context()
    ir.load_dialects(context)
    nvidia.load_dialects(context)
    with tempfile.NamedTemporaryFile("w", suffix=".ttgir") as file:
        file.write(ttgir)
        file.flush()
        module = ir.parse_mlir_module(file.name, context)
    module.context = context
    manager = ir.pass_manager(context)
    passes.ttgpuir.add_allocate_warp_groups(manager)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, 90, 86)
    manager.run(module, "places in shared memory")
    return str(module)
