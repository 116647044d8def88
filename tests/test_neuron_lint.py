"""Every rule of the lint catches a small module made for it."""

from __future__ import annotations

import pytest
import torch
from lmi_multi.backends.neuron import lint
from lmi_multi.backends.neuron.lower import Graph

from lmi_multi.errors import BackendError

GOOD = """HloModule step, entry_computation_layout={(f32[8,2]{1,0}, s64[4]{0})->(f32[4,2]{1,0})}

Add.1 {
  x.2 = f32[] parameter(0)
  y.3 = f32[] parameter(1)
  ROOT add.4 = f32[] add(x.2, y.3)
}

ENTRY step {
  p0.5 = f32[8,2]{1,0} parameter(0)
  p1.6 = s64[4]{0} parameter(1)
  gather.7 = f32[4,2]{1,0} gather(p0.5, p1.6), start_index_map={0}, slice_sizes={1,2}
  all-reduce.8 = f32[4,2]{1,0} all-reduce(gather.7), replica_groups={{0,1}}, to_apply=Add.1
  constant.9 = f32[] constant(0)
  reduce.10 = f32[4]{0} reduce(all-reduce.8, constant.9), dimensions={1}, to_apply=Add.1
  ROOT tuple.11 = (f32[4]{0}, f32[8,2]{1,0}) tuple(reduce.10, p0.5)
}
"""


BOUNDS = {"ids": 8}


def graph(text: str = GOOD, parameters: tuple[str, ...] = ("k0", "input.ids")) -> Graph:
    return Graph("decode", b"", text, parameters, {}, 1, ["k0"])


def having(*lines: str) -> str:
    """GOOD with more instructions."""
    return GOOD.replace("  constant.9", "\n".join(f"  {line}" for line in lines) + "\n  constant.9")


def test_a_good_module_has_no_faults() -> None:
    lint.check(graph(), 2, BOUNDS)
    found = {i.name: i for i in lint.instructions(GOOD)}
    assert found["gather.7"].operands == ["p0.5", "p1.6"]
    assert found["p0.5"].entry
    assert not found["x.2"].entry
    assert found["tuple.11"].shapes == ["f32[4]", "f32[8,2]"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("sort.1 = f32[8]{0} sort(a), dimensions={0}, to_apply=Less", "sort.1: sort"),
        ('c.1 = (f32[4]{0}, s32[4]{0}) custom-call(a), custom_call_target="TopK"', "c.1: sort"),
        ("r.1 = (f32[4]{0}, s64[4]{0}) reduce(a, b, c, d), dimensions={1}", "r.1: variadic reduce"),
        ("w.1 = (f32[4]{0}, s32[4]{0}) reduce-window(a, b, c, d)", "w.1: variadic reduce-window"),
        ("m.1 = f64[4]{0} multiply(a, b)", "m.1: f64[4] has 64-bit floats"),
        ("p.1 = f64[] parameter(3)", "p.1: f64[] has 64-bit floats"),
        ("n.1 = s64[<=8,1]{1,0} slice(a)", "n.1: s64[<=8,1] is a dynamic shape"),
        ("d.1 = f32[8]{0} set-dimension-size(a, b), dimensions={0}", "d.1: dynamic shape"),
        ("w.1 = (s32[], f32[4]{0}) while(t), condition=c, body=b", "w.1: loop"),
        ("i.1 = f32[4]{0} conditional(a, b, c)", "i.1: branch"),
        ("u.1 = f32[4]{0} rng(a, b), distribution=rng_uniform", "u.1: random numbers"),
        ("k.1 = s64[] constant(2147483648)", "k.1: a constant beyond 32 bits"),
        ("k.1 = s64[2]{0} constant({1, -5000000000})", "k.1: a constant beyond 32 bits"),
        ("g.1 = f32[4,3]{1,0} gather(p0.5, p1.6), slice_sizes={1,3}", "g.1: gathers [1, 3] out of"),
        ("a.1 = f32[4]{0} all-reduce(x), replica_groups={{0},{1}}", "replica groups are {{0},{1}}"),
        ("a.1 = f32[4]{0} all-reduce(x), replica_groups={{1,0}}", "must be {{0,1}}"),
        ("a.1 = f32[8]{0} all-gather(x), replica_groups={}, dimensions={0}", "must be {{0,1}}"),
        (
            "a.1 = (f32[4]{0}, f32[]) all-reduce(x, t), replica_groups={{0,1,2,3}}, to_apply=Add",
            "replica groups are {{0,1,2,3}}",
        ),
    ],
)
def test_each_rule(line: str, fault: str) -> None:
    text = having(line)
    found = list(lint.faults(text, 2))
    assert len(found) == 1
    assert fault in found[0]
    with pytest.raises(BackendError, match="graph decode cannot run: "):
        lint.check(graph(text), 2, BOUNDS)


def test_state_that_does_not_come_in() -> None:
    assert list(lint.state_faults(graph(parameters=("w__embed", "input.ids")))) == [
        "state k0 is read by 0 inputs, must be one"
    ]


def test_state_that_does_not_go_out() -> None:
    text = GOOD.replace(", f32[8,2]{1,0}) tuple(reduce.10, p0.5)", ") tuple(reduce.10)")
    assert list(lint.state_faults(graph(text))) == ["1 outputs, not 1 and 1 states"]


def test_state_that_changes_its_shape() -> None:
    text = GOOD.replace("(f32[4]{0}, f32[8,2]{1,0}) tuple", "(f32[4]{0}, f32[4,2]{1,0}) tuple")
    assert list(lint.state_faults(graph(text))) == [
        "state k0 comes in as f32[8,2] and goes out as f32[4,2]"
    ]


def test_ranks_that_trace_different_graphs() -> None:
    lint.check_same(graph(), graph(GOOD.replace("all-reduce.8", "all-reduce.88")))
    other = graph(GOOD.replace("constant(0)", "constant(50)"))
    with pytest.raises(BackendError, match=r"decode cannot run: ranks trace constant .* 0 .* 50"):
        lint.check_same(graph(), other)
    crossed = graph(
        GOOD.replace("reduce(all-reduce.8, constant.9)", "reduce(gather.7, constant.9)")
    )
    with pytest.raises(BackendError, match=r"ranks trace reduce .*\[6, 7\].* and .*\[5, 7\]"):
        lint.check_same(graph(), crossed)
    with pytest.raises(BackendError, match="disagree on its parameters"):
        lint.check_same(graph(), graph(parameters=("input.ids", "k0")))
    longer = graph(GOOD + "  neg.1 = f32[] negate(p0.5)\n")
    with pytest.raises(BackendError, match="ranks trace 10 and 11 instructions"):
        lint.check_same(graph(), longer)


@pytest.mark.parametrize("value", [-1, 8])
def test_indices_out_of_range(value: int) -> None:
    lint.check_inputs("decode", {"slots": 8}, {"slots": torch.tensor([0, 7])})
    with pytest.raises(BackendError, match="graph decode: slots leaves the range 0 to 7"):
        lint.check_inputs("decode", {"slots": 8}, {"slots": torch.tensor([0, value])})


SCATTER = "scatter(p0.5, {0}, gather.7), update_window_dims={{1}}, inserted_window_dims={{0}}, "
SCATTER += "scatter_dims_to_operand_dims={{0}}, index_vector_dim=1, to_apply=Add.1"


@pytest.mark.parametrize(
    ("made", "low", "high"),
    [
        (["x.1 = s64[4]{0} negate(p1.6)"], -7, 0),
        (["c.1 = s64[] constant(1)", "x.1 = s64[4]{0} add(p1.6, c.1)"], 1, 8),
        (["c.1 = s64[] constant(-2)", "x.1 = s64[4]{0} multiply(p1.6, c.1)"], -14, 0),
        (["c.1 = s64[] constant(1)", "x.1 = s64[4]{0} subtract(p1.6, c.1)"], -1, 6),
        (["x.1 = s64[9]{0} iota(), iota_dimension=0"], 0, 8),
        (["f.1 = f32[4]{0} convert(p1.6)", "x.1 = s64[4]{0} convert(f.1)"], "-inf", "inf"),
        (["x.1 = s64[4]{0} remainder(p1.6, p1.6)"], "-inf", "inf"),
        (["x.1 = s64[40]{0} constant({...})"], "-inf", "inf"),
        (["c.1 = s64[] constant(400000000)", "x.1 = s64[] multiply(p1.6, c.1)"], "-inf", "inf"),
        (["c.1 = s64[2]{0} constant({3, 9})", "x.1 = s64[6]{0} concatenate(p1.6, c.1)"], 0, 9),
    ],
)
def test_indices_that_may_leave_what_they_are_for(made: list[str], low: int, high: int) -> None:
    """What is made of inputs that the host has checked is followed through the graph."""
    for access in ("gather(p0.5, {0}), start_index_map={{0}}, slice_sizes={{1,2}}", SCATTER):
        lines = [*made, f"y.1 = f32[8,2]{{1,0}} {access.format('x.1')}"]
        text = GOOD.replace(
            "  constant.9", "\n".join(f"  {line}" for line in lines) + "\n  constant.9"
        )
        [fault] = lint.range_faults(graph(text), BOUNDS)
        name = access.partition("(")[0]
        assert fault == f"y.1: {name} at {low} to {high}, which must be 0 to 7 of f32[8,2]"
        with pytest.raises(BackendError, match=f"graph decode cannot run: y.1: {name} at"):
            lint.check(graph(text), 2, BOUNDS)


@pytest.mark.parametrize(
    "made",
    [
        [
            "a.1 = s64[4]{0} negate(p1.6)",
            "z.1 = s64[] constant(0)",
            "x.1 = s64[4]{0} maximum(a.1, z.1)",
        ],
        [
            "z.1 = s64[] constant(0)",
            "n.1 = s64[] constant(7)",
            "r.1 = s64[4]{0} remainder(p1.6, p1.6)",
            "x.1 = s64[4]{0} clamp(z.1, r.1, n.1)",
        ],
        [  # as torch lowers an index, which may count from the end: here none does
            "z.1 = s64[] constant(0)",
            "n.1 = s64[] constant(8)",
            "a.1 = s64[4]{0} add(p1.6, n.1)",
            "c.1 = pred[4]{0} compare(p1.6, z.1), direction=LT",
            "x.1 = s64[4]{0} select(c.1, a.1, p1.6)",
        ],
        ["b.1 = pred[4]{0} not(q.1)", "x.1 = s64[4]{0} convert(b.1)"],
        ["c.1 = s64[] constant(5)", "x.1 = s64[4]{0} minimum(p1.6, c.1)"],
    ],
)
def test_indices_that_stay_in_range(made: list[str]) -> None:
    lines = [*made, "y.1 = f32[4,2]{1,0} gather(p0.5, x.1), start_index_map={0}, slice_sizes={1,2}"]
    lint.check(graph(having(*lines)), 2, BOUNDS)


def test_inputs_that_nobody_checks_may_be_anything() -> None:
    with pytest.raises(BackendError, match=r"gather.7: gather at -inf to inf, which must be"):
        lint.check(graph(), 2, {})
