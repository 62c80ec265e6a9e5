"""The parts "attention", "timeline" and "messages" of several_gpus.py: the operator over a sequence that GPUs share."""

import functools
import re

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sla2_kernels import select_key_blocks, sla2_attention
from sla2_kernels.eight_bit_exchange import EightBitExchange
from sla2_kernels.peer_copies import CannotCopy, peers_for
from sla2_kernels.pool_routing import PoolRouting
from sla2_kernels.sequence_parallel import WholeExchange, sequence_parallel_attention

from .inputs import Shape, find_shape, make_inputs
from .measure import is_gpu, median_ms
from .ours import weights_for
from .together import SPARSITY, WARMUP, each_slowest_ms, largest

# what this calls them -> what the operator does; on a CPU "nccl" is gloo
TRANSFERS = {"copies": "copies", "nccl": "collective"}
IN_A_ROW = 8  # calls
TINY = Shape("tiny", 8, (1, 1, 600), head_dim=32)
# (precision, exchange, groups of heads or their relative sizes, what carries the exchange)
WAYS = (
    *(("int8", "16bit", groups, transfer) for groups in (4, 5, 2, 1) for transfer in TRANSFERS),
    *(("16bit", "16bit", groups, transfer) for groups in (4, 5, 2, 1) for transfer in TRANSFERS),
    *((precision, "16bit", (1, 3, 1), "copies") for precision in ("int8", "16bit")),
    *(("int8", "8bit", groups, "nccl") for groups in (1, 2)),
)


class Call:
    """One sequence, whole on every GPU, with the weights of a router."""

    def __init__(self, args, device):
        self.shape = TINY if args.tiny else find_shape(args.shape)
        self.qkv = make_inputs(self.shape, device=device)
        self.weights = weights_for("learned", self.shape.heads, self.shape.head_dim, device)
        self.routing = PoolRouting(SPARSITY, self.weights.proj_q, self.weights.proj_k)

    def share(self, processes, rank):
        return [x.chunk(processes, dim=1)[rank].contiguous() for x in self.qkv]

    def attend(self, precision):
        """What sequence_parallel_attention() calls for a group of heads."""

        def attend(q, k, v, heads, key_blocks=None):
            own = self.weights.heads(heads)
            return sla2_attention(
                q, k, v, own.proj_q, own.proj_k, own.alpha,
                sparsity=SPARSITY, precision=precision, layout="BNHD", key_blocks=key_blocks,
            )  # fmt: skip

        return attend

    def together(self, mine, attend, exchange, groups, transfer):
        """A call that the processes share: a function without arguments. mine: this process's q, k and v."""
        routing = self.routing if exchange == "8bit" else None
        options = {"head_groups": groups, "routing": routing, "transfer": TRANSFERS.get(transfer, "auto")}
        return functools.partial(sequence_parallel_attention, *mine, attend, **options)


@torch.no_grad()
def attention(args, device):
    """Rows of WAYS with ms_alone, ms_together, ms_exchange, error, equal; medians over calls of the slowest process.

    Each of these calls finds the GPUs idle; in ms_alone_of_many and ms_together_of_many IN_A_ROW calls follow each other.
    By copies only where the GPUs can. All calls take turns. equal: the outputs before and after the timed calls both.
    """
    call = Call(args, device)
    processes, rank = dist.get_world_size(), dist.get_rank()
    mine = call.share(processes, rank)
    alone, expected = {}, {}
    for precision in ("int8", "16bit"):
        alone[precision] = functools.partial(call.attend(precision), *call.qkv, slice(None))
        expected[precision] = alone[precision]().chunk(processes, dim=1)[rank].clone()
    copies = can_copy(mine[0])
    ways = [way for way in WAYS if copies or way[3] != "copies"]
    together = [call.together(mine, call.attend(precision), *how) for precision, *how in ways]
    exchanges = [call.together(mine, lambda q, *others: q, *how) for _, *how in ways]
    outputs = [function() for function in together]
    ms = each_slowest_ms([*alone.values(), *together, *exchanges], device)
    ms_alone, ms = dict(zip(alone, ms, strict=False)), ms[len(alone) :]
    of_many = each_slowest_ms([*alone.values(), *together], device, calls=5, warmup=1, in_a_row=IN_A_ROW)
    alone_of_many, of_many = dict(zip(alone, of_many, strict=False)), of_many[len(alone) :]
    rows = []
    for place, (precision, exchange, groups, transfer) in enumerate(ways):
        out, again, right = outputs[place], together[place](), expected[precision]
        error = (out.float() - right.float()).norm() / right.float().norm()
        rows.append(
            {
                "precision": precision,
                "exchange": exchange,
                "groups": groups,
                "transfer": transfer,
                "ms_alone": ms_alone[precision],
                "ms_together": ms[place],
                "ms_alone_of_many": alone_of_many[precision],
                "ms_together_of_many": of_many[place],
                "ms_exchange": ms[len(ways) + place],
                "error": largest(error.item(), device),
                "equal": not largest(float(not (torch.equal(out, right) and torch.equal(again, right))), device),
            }
        )
    return rows


def can_copy(q):
    try:
        peers_for(q, None, [slice(0, 1)])
    except CannotCopy as refused:
        if dist.get_rank() == 0:
            print(f"no rows by copies: {refused.reason}", flush=True)
        return False
    return True


@torch.no_grad()
def timeline(args, device):
    """Rows {start_us, us, stream, idle_us, name} of what the GPU of rank 0 does in one INT8 call, in order of start, after a barrier.

    idle_us: since the stream's last activity ended. On a CPU: torch's operators, and threads for streams.
    """
    call = Call(args, device)
    mine = call.share(dist.get_world_size(), dist.get_rank())
    groups = [int(size) for size in args.groups.split(":")]
    groups = groups[0] if len(groups) == 1 else groups
    attend = call.together(mine, call.attend("int8"), "16bit", groups, args.transfer)
    for _ in range(WARMUP):
        attend()
    activity, kind = (
        (ProfilerActivity.CUDA, DeviceType.CUDA) if is_gpu(device) else (ProfilerActivity.CPU, DeviceType.CPU)
    )
    for _ in range(2):  # a process's first profile begins late
        with profile(activities=[activity]) as profiled:
            dist.barrier()
            if is_gpu(device):
                torch.cuda.synchronize()
            attend()
            if is_gpu(device):
                torch.cuda.synchronize()
    events = [event for event in profiled.profiler.kineto_results.events() if event.device_type() == kind]
    return in_order([(e.start_ns() / 1e3, e.duration_ns() / 1e3, e.device_resource_id(), e.name()) for e in events])


def in_order(activities):
    """Rows as timeline() has them of (start, microseconds, stream, name), starts in microseconds too."""
    rows, ends = [], {}
    activities = sorted(activities)
    for start, us, stream, name in activities:
        idle = start - ends.get(stream, start)
        rows.append({"start_us": start - activities[0][0], "us": us, "stream": stream, "idle_us": idle, "name": name})
        ends[stream] = start + us
    return rows


def timeline_table(runs):
    lines = ["start us | us | stream | idle us | what"]
    for rows in runs.values():
        for row in rows:
            name = re.sub(r"^void |at::native::|\(anonymous namespace\)::", "", row["name"])[:40]
            lines.append(f"{row['start_us']:.0f} | {row['us']:.0f} | {row['stream']} | {row['idle_us']:.0f} | {name}")
    return "\n".join(lines)


def attention_table(runs):
    lines = [
        "| GPUs | bits | exchange | groups | by | one GPU ms | together ms | exchanges alone ms | speed-up | of many: one GPU ms | "
        "together ms | speed-up | error against one GPU |",
        "|---" * 13 + "|",
    ]
    for count, rows in runs.items():
        for row in rows:
            error = "equal bit by bit" if row["equal"] else f"{row['error']:.1e}"
            lines.append(
                f"| {count} | {row['precision']} | {row['exchange']} | {row['groups']} | {row['transfer']} | {row['ms_alone']:.2f} | "
                f"{row['ms_together']:.2f} | {row['ms_exchange']:.2f} | {row['ms_alone'] / row['ms_together']:.2f}x | "
                f"{row['ms_alone_of_many']:.2f} | {row['ms_together_of_many']:.2f} | "
                f"{row['ms_alone_of_many'] / row['ms_together_of_many']:.2f}x | {error} |"
            )
    return "\n".join(lines)


@torch.no_grad()
def messages(args, device):
    """Rows {processes, exchange, ms_pack, ms_open, megabytes, same_selection, error, error_of_one}: one GPU plays each of several.

    Times are those of one of the processes, for all of its heads. error: of its INT8 attention against one GPU's in 16 bit, and
    error_of_one that of INT8 on one GPU.
    """
    call = Call(args, device)
    heads = call.shape.heads
    exact, int8 = (call.attend(precision)(*call.qkv, slice(None)).float() for precision in ("16bit", "int8"))
    options = {"sparsity": SPARSITY, "layout": "BNHD"}
    selected = select_key_blocks(*call.qkv[:2], call.weights.proj_q, call.weights.proj_k, **options)
    rows = []
    for processes in (2, 4):
        part = slice(0, heads // processes)
        shares = [call.share(processes, rank) for rank in range(processes)]
        for exchange in ("16bit", "8bit"):

            def pack(rank, processes=processes, exchange=exchange, shares=shares, part=part):
                return _exchange(exchange, shares[rank], processes, rank, call.routing), part

            made = [pack(rank)[0] for rank in range(processes)]
            received = torch.stack([one.message(part)[0] for one in made])
            opened = made[0].opened(received, part)
            out = call.attend("int8")(*opened).float()
            rows.append(
                {
                    "processes": processes,
                    "exchange": exchange,
                    "ms_pack": median_ms(lambda pack=pack: pack(0)[0].message(pack(0)[1]), device),
                    "ms_open": median_ms(lambda: made[0].opened(received, part), device),  # noqa: B023  called here
                    "megabytes": received.nbytes / 1e6,
                    "same_selection": exchange == "16bit" or torch.equal(opened[-1].key_blocks, selected[:, part]),
                    "error": ((out - exact[:, :, part]).norm() / exact[:, :, part].norm()).item(),
                    "error_of_one": ((int8 - exact)[:, :, part].norm() / exact[:, :, part].norm()).item(),
                }
            )
    return rows


def _exchange(exchange, share, processes, rank, routing):
    if exchange == "8bit":
        return EightBitExchange(*share, processes, rank, routing)
    return WholeExchange(*share, processes)


def messages_table(runs):
    lines = [
        "| GPUs | exchange | pack ms | open ms | MB in | same selection | error, INT8 | of one GPU |",
        "|---" * 8 + "|",
    ]
    for row in runs[1]:
        lines.append(
            f"| {row['processes']} | {row['exchange']} | {row['ms_pack']:.2f} | {row['ms_open']:.2f} | "
            f"{row['megabytes']:.0f} | {'yes' if row['same_selection'] else 'NO'} | {row['error']:.4f} | {row['error_of_one']:.4f} |"
        )
    return "\n".join(lines)
