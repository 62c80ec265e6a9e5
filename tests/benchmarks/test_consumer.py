"""benchmarks.consumer as far as it goes without a GPU: occupancy, what ptxas makes of a kernel, estimate, table, arguments."""

import importlib.util

import pytest

from benchmarks import consumer, memory_traffic, readme
from benchmarks.consumer_imitation import CARDS, HOST_SHARED, RESERVED, Kernel, padded_shared
from benchmarks.consumer_roofline import SHEETS, Work, milliseconds, sla2_work, sol_work
from benchmarks.consumer_table import consumer_markdown, traffic_markdown

KB = 1024
SHAPE = consumer.SHAPES["LTX-2"]


def on_host(shared):
    """Programs that an H100's shared memory leaves room for."""
    return HOST_SHARED // (shared + RESERVED)


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "programs"),
    [
        (86, 8, 255, 48 * KB, 1),  # registers: 8 warps of 255 a thread are one program
        (89, 4, 168, 32 * KB, 3),  # registers and shared memory
        (89, 4, 40, 1 * KB, 12),  # 48 warps
        (80, 4, 40, 1 * KB, 12),  # registers: its 64 warps would be 16
        (86, 1, 32, 0, 16),  # 16 programs, where sm_89 has 24
        (89, 8, 128, 99 * KB, 1),
    ],
)
def test_no_more_programs_run_than_on_the_card(arch, warps, registers, shared, programs):
    card = CARDS[arch]
    assert card.resident(warps, registers, shared) == programs
    padded = padded_shared(card, warps, registers, shared)
    assert padded >= shared and on_host(padded) <= programs


def test_a_kernel_that_the_card_cannot_start_is_refused():
    with pytest.raises(ValueError, match="sm_86 cannot start a kernel of 8 warps, 128 registers, 102400 bytes"):
        padded_shared(CARDS[86], 8, 128, 100 * KB)


def test_a_row_is_marked_where_the_host_runs_other_instructions():
    same = {"IMMA.16832.S8.S8": 64}
    sizes = ("kernel", 4, 168, 0, 32 * KB, 75 * KB, 3)
    assert Kernel(*sizes, same, same).faithful
    assert not Kernel(*sizes, {"HMMA.16816.F32": 128}, {"QMMA.16832.F32.E4M3.E4M3": 64}).faithful


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_ptx_of_another_card_is_assembled_and_its_matrix_instructions_counted(tmp_path, monkeypatch):
    from benchmarks.consumer_imitation import assembled, matrix_instructions, resources

    registers = " ".join(f".reg .b32 %{name}<4>;" for name in "abcd")
    ptx = f""".version 8.0
.target sm_80
.address_size 64
.visible .entry product(.param .u64 out) {{
    {registers}
    .reg .b64 %at;
    ld.param.u64 %at, [out];
    ld.global.v4.b32 {{%a0, %a1, %a2, %a3}}, [%at];
    mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {{%d0, %d1, %d2, %d3}}, {{%a0, %a1, %a2, %a3}}, {{%a0, %a1}}, {{%a0, %a1, %a2, %a3}};
    st.global.v4.b32 [%at], {{%d0, %d1, %d2, %d3}};
    ret;
}}
"""
    for arch in (80, 86, 90):
        cubin = assembled(ptx, arch)
        assert matrix_instructions(cubin) == {"IMMA.16832.S8.S8": 1}
        used, stack = resources(cubin)
        assert 4 <= used <= 32 and stack == 0


def test_the_estimate_counts_the_longer_of_bytes_and_products():
    sheet = SHEETS[0]
    assert Work("copy", sheet.memory, {}).seconds(sheet) == 1
    assert Work("both", sheet.memory, {"int8": 2 * sheet.rates["int8"]}).seconds(sheet) == 2
    assert Work("mixed", 0, {"int8": sheet.rates["int8"], "16bit": sheet.rates["16bit"]}).seconds(sheet) == 2


def test_the_estimate_falls_with_int8_and_with_what_is_skipped():
    sixteen = {"pv": "16bit", "sums": "16bit", "scores": "tf32"}
    for sheet in SHEETS:
        low, high = (milliseconds(sla2_work(SHAPE, 0.9, formats), sheet) for formats in (consumer.FORMATS, sixteen))
        assert 0 < low < high
        assert milliseconds(sla2_work(SHAPE, 0.97, consumer.FORMATS), sheet) < low
        assert milliseconds(sol_work(SHAPE, 0.03), sheet) < milliseconds(sol_work(SHAPE, 0.1), sheet)


def test_the_estimate_s_table_has_every_shape(capsys):
    consumer.main(["--roofline", "--sparsities", "0.97"])
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in consumer.SHAPES) and "RTX 4090, 97%" in table


def row(method, setting, ms, sparsity=0.97, **fields):
    of_ours = {"relative_error": 0.03, "passed": True} if method == "sla2" else {}
    return {
        "part": "sm_89", "method": method, "setting": setting, "shape": "LTX-2", "sparsity": sparsity, "ms": ms,
        "graph": method == "sla2", "host_ms": 0.3, "launches": 13, "other_instructions": [],
    } | of_ours | fields  # fmt: skip


def test_the_table_compares_at_an_equal_share_and_marks_other_instructions():
    rows = [
        row("sla2", "fitted", 1.0),
        row("sla2", "a ratio per head", 0.9, other_instructions=["_loop"]),
        row("sol_attn", "equal share", 2.0),
        row("sol_attn", "tau 1.3", 3.0, sparsity=None),
    ]
    table = consumer_markdown({"environment": {"card": "H200"}, "rows": rows})
    assert "| sm_89 | **SLA2**, int8, fitted | 1.00 (2.00x) |" in table
    assert "| 0.90* |" in table and "other matrix instructions in _loop" in table
    assert (
        "without a CUDA graph" in table
        and "Not timed with this build: the instructions of sm_80 (A100) and sm_86" in table
    )
    assert "| sol_attn, tau 1.3 | 3.00 |" in table and "No RTX card was timed" in table


def test_a_wrong_output_leaves_no_time_in_the_table():
    table = consumer_markdown({"environment": {"card": "H200"}, "rows": [row("sla2", "fitted", 1.0, passed=False)]})
    assert "| wrong |" in table and "1.00" not in table


def test_nothing_measured_is_said():
    with pytest.raises(ValueError, match="no row of another card's instructions"):
        consumer_markdown({"environment": {}, "rows": []})


@pytest.mark.parametrize(
    ("words", "sentence"), [(["--shapes", "4K"], "'4K' is not one of"), (["--archs", "70"], "sm_70 is not one of")]
)
def test_unknown_shapes_and_architectures_are_refused(words, sentence, capsys):
    with pytest.raises(SystemExit):
        consumer.main(words)
    assert sentence in capsys.readouterr().err


NCU = """==PROF== Connected to process 12
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","12","_pack","Command line profiler metrics","dram__bytes_read.sum","byte","1,500,000,000"
"0","12","_pack","Command line profiler metrics","dram__bytes_write.sum","byte","516,000,000"
"0","12","_pack","Command line profiler metrics","gpu__time_duration.sum","ns","500,000"
"1","12","_loop","Command line profiler metrics","dram__bytes_read.sum","byte","0"
"1","12","_loop","Command line profiler metrics","dram__bytes_write.sum","byte","0"
"1","12","_loop","Command line profiler metrics","gpu__time_duration.sum","ns","4,000,000"
"2","12","spin_kernel(long)","Command line profiler metrics","dram__bytes_read.sum","byte","0"
"3","12","prep_k","Command line profiler metrics","dram__bytes_read.sum","byte","504,000,000"
"3","12","prep_k","Command line profiler metrics","dram__bytes_write.sum","byte","504,000,000"
"3","12","prep_k","Command line profiler metrics","gpu__time_duration.sum","ns","1"
"4","12","prep_k","Command line profiler metrics","dram__bytes_read.sum","byte","0"
"4","12","prep_k","Command line profiler metrics","dram__bytes_write.sum","byte","0"
"4","12","prep_k","Command line profiler metrics","gpu__time_duration.sum","ns","0"
"5","12","spin_kernel(long)","Command line profiler metrics","dram__bytes_read.sum","byte","0"
"""


def test_bytes_that_ncu_counts_become_a_table():
    calls = [{"method": method, "shape": "LTX-2", "sparsity": 0.97} for method in ("sla2", "sol_attn")]
    rows = memory_traffic.joined(calls, memory_traffic.counted(NCU))
    assert [[kernel["name"] for kernel in row["kernels"]] for row in rows] == [["_pack", "_loop"], ["prep_k"]]
    environment = {"card": "H200", "torch": "2.11", "triton": "3.6"}
    table = traffic_markdown({"rows": rows, "parts": {"traffic": {"environment": environment}}})
    assert "| GB to and from memory | 2.02 (1.01) |" in table
    # 1,008 GB a second: 2 ms of bytes; then 4 ms here, on 132 multiprocessors at 1.98 GHz instead of 128 at 2.52
    assert f"| ms on an RTX 4090 | {2 + 4 * 132 * 1.98 / (128 * 2.52):.2f} (1.00) |" in table
    assert traffic_markdown({"rows": [], "parts": {}}) == ""
    assert "| ms on an RTX 4090 | 5.24 |" in traffic_markdown(
        {"rows": rows[:1], "parts": {"traffic": {"environment": environment}}}
    )


def test_calls_that_ncu_did_not_count_are_refused():
    with pytest.raises(ValueError, match="ncu counted 2 calls of 1"):
        memory_traffic.joined([{}], memory_traffic.counted(NCU))


def test_another_part_keeps_the_environment_of_its_own_run():
    before = {"environment": {"card": "H200"}, "parts": {"sm_89": {}}, "rows": [{"part": "sm_89"}]}
    content = memory_traffic.with_traffic(before, [{"part": "traffic"}], {"card": "H100"})
    assert content["environment"] == {"card": "H200"}
    assert content["parts"]["traffic"] == {"environment": {"card": "H100"}} and len(content["rows"]) == 2
    alone = memory_traffic.with_traffic({"environment": {}, "parts": {}, "rows": []}, [], {"card": "H100"})
    assert alone["environment"] == {"card": "H100"}


def test_what_ncu_says_beside_its_table_is_shown(tmp_path):
    report = tmp_path / "ncu.csv"
    assert memory_traffic.said(report) == []
    report.write_text(NCU + "==ERROR== no permission\n")
    assert memory_traffic.said(report) == ["==PROF== Connected to process 12", "==ERROR== no permission"]


def test_a_results_file_with_bytes_alone_has_its_table_in_the_readme():
    calls = [{"method": "sla2", "shape": "LTX-2", "sparsity": 0.97}]
    rows = memory_traffic.joined(calls, memory_traffic.counted(NCU)[:1])
    environment = {"card": "H200", "torch": "2.11", "triton": "3.6"}
    content = memory_traffic.with_traffic({"environment": {}, "parts": {}, "rows": []}, rows, environment)
    assert readme.cards([content]) == [traffic_markdown(content)]
