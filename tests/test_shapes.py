"""rtk/shapes.py: problems in a line or in a file, and errors that name the key at fault."""

from __future__ import annotations

import json
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtk import shapes
from rtk.errors import ArgumentError, ToolchainError
from rtk.problem import AttentionProblem, attention_problem

FULL = "b=4,hq=32,hk=8,sq=4096,sk=4096,d=128,dv=128,dtype=bf16,causal,window=1024:0,softcap=30"


def test_a_whole_line():
    assert shapes.parse(FULL) == AttentionProblem(
        4, 32, 8, 4096, 4096, 128, 128, "bfloat16", 1 / math.sqrt(128), 30.0, window_left=1024, window_right=0
    )


def test_defaults_and_spaces():
    expected = AttentionProblem(1, 8, 8, 300, 300, 64, 64, "bfloat16", 1 / 8)
    assert shapes.parse("hq=8,sq=300,d=64") == shapes.parse(" d = 64 , sq=300, hq=8 ") == expected
    assert shapes.parse("hq=8,sq=300,d=64,causal=false,window=:,softcap=0,align=bottom-right") == expected
    assert shapes.problem({"hq": 8, "sq": 300, "d": 64}) == expected


@pytest.mark.parametrize(
    ("more", "field", "value"),
    [
        ("dtype=fp16", "dtype", "float16"),
        ("dtype=float16", "dtype", "float16"),
        ("dtype=bfloat16", "dtype", "bfloat16"),
        ("causal", "window_right", 0),
        ("causal=yes", "window_right", 0),
        ("causal=0", "window_right", None),
        ("window=17:", "window_left", 17),
        ("window=:5", "window_right", 5),
        ("window=-1:none", "window_left", None),
        ("window=100000:0", "window_left", None),  # no bound at all, as in a call
        ("sk=500", "diagonal", 200),
        ("sk=500,align=top-left", "diagonal", 0),
        ("scale=-0.25", "softmax_scale", -0.25),
        ("softcap=1e1", "softcap", 10.0),
        ("dv=256", "head_dim_v", 256),
        ("hk=2", "num_heads_kv", 2),
        ("b=7", "batch", 7),
    ],
)
def test_each_key(more, field, value):
    assert getattr(shapes.parse(f"hq=8,sq=300,d=64,{more}"), field) == value


@pytest.mark.parametrize(
    ("text", "at_fault", "said"),
    [
        ("", "shape ''", "KEY=VALUE"),
        ("hq=8,,d=64", "shape", "separated by commas"),
        ("hq=8,sq=300", "d in", "received nothing"),
        ("sq=300,d=64", "hq in", "received nothing"),
        ("hq=8,d=64", "sq in", "received nothing"),
        ("hq=8,sq=300,d=64,heads=3", "shape", "the key 'heads'"),
        ("hq=8,sq=300,d=64,Causal", "shape", "the key 'Causal'"),
        ("hq=8,sq=300,d=64,hq=8", "hq in", "it twice"),
        ("hq,sq=300,d=64", "hq in", "no value"),
        ("hq=8,sq=300,d=64,softcap", "softcap in", "no value"),
        ("hq=0,sq=300,d=64", "hq in", "received 0"),
        ("hq=8,sq=-3,d=64", "sq in", "received -3"),
        ("hq=8,sq=many,d=64", "sq in", "received many"),
        ("hq=8,sq=3.5,d=64", "sq in", "received 3.5"),
        ("hq=8,sq=,d=64", "sq in", "integer"),
        ("hq=8,sq=1073741824,d=64", "sq in", "2**30"),
        ("hq=8,sq=300,d=60", "d in", "multiple of 8 from 8 to 256"),
        ("hq=8,sq=300,d=64,dv=264", "dv in", "multiple of 8 from 8 to 256"),
        ("hq=8,hk=3,sq=300,d=64", "hq in", "a multiple of hk, 3"),
        ("hq=8,sq=300,d=64,dtype=fp32", "dtype in", "bf16 or fp16"),
        ("hq=8,sq=300,d=64,causal=perhaps", "causal in", "true or false"),
        ("hq=8,sq=300,d=64,align=left", "align in", "bottom-right or top-left"),
        ("hq=8,sq=300,d=64,window=5", "window in", "LEFT:RIGHT"),
        ("hq=8,sq=300,d=64,window=5:6:7", "window in", "LEFT:RIGHT"),
        ("hq=8,sq=300,d=64,window=-5:0", "window in", "LEFT:RIGHT"),
        ("hq=8,sq=300,d=64,window=a:b", "window in", "LEFT:RIGHT"),
        ("hq=8,sq=300,d=64,softcap=-1", "softcap in", "0 for none"),
        ("hq=8,sq=300,d=64,softcap=nan", "softcap in", "0 for none"),
        ("hq=8,sq=300,d=64,scale=inf", "scale in", "a number"),
        ("hq=8,sq=300,d=64,scale=1e39", "scale in", "finite"),  # to the device, which has float32
        ("b=1000000,hq=8000,sq=1000000,d=64", "shape", "2**36"),  # right one by one
    ],
)
def test_errors_name_the_key_at_fault(text, at_fault, said):
    with pytest.raises(ArgumentError) as caught:
        shapes.parse(text)
    assert str(caught.value).startswith(f"rtk: {at_fault}")
    assert said in str(caught.value)
    assert repr(text) in str(caught.value)


PROBLEMS = st.builds(
    lambda b, hk, group, sq, sk, d, dv, dtype, causal, align, window, scale, softcap: attention_problem(
        (b, hk * group, sq, 8 * d),
        (b, hk, sk, 8 * d),
        (b, hk, sk, 8 * dv),
        dtype,
        causal=causal,
        causal_align=align,
        window_size=window,
        softmax_scale=scale,
        softcap=softcap,
        layout="bhsd",
    ),
    *[st.integers(1, 9)] * 3,
    *[st.integers(1, 5000)] * 2,
    *[st.integers(1, 32)] * 2,
    st.sampled_from(["bfloat16", "float16"]),
    st.booleans(),
    st.sampled_from(["bottom-right", "top-left"]),
    st.none() | st.tuples(*[st.none() | st.integers(0, 6000)] * 2),
    st.none() | st.floats(-10, 10),
    st.just(0.0) | st.floats(0.5, 100),
)


@given(PROBLEMS)
def test_what_is_described_is_parsed(problem):
    line = shapes.describe(problem)
    assert shapes.parse(line) == problem
    fields = {key: value or True for key, _, value in (part.partition("=") for part in line.split(","))}
    assert shapes.problem(fields) == problem  # as in a file


@given(st.text(st.sampled_from("bhqskdv=,:-.0123456789causltypefinw "), max_size=40))
def test_any_text_is_a_problem_or_an_argument_error(text):
    try:
        assert isinstance(shapes.parse(text), AttentionProblem)
    except ArgumentError as error:
        assert str(error)


# --- files -----------------------------------------------------------------------------------------------------------

TOML = """
problems = [
    "hq=8,sq=300,d=64",
    { b = 2, hq = 8, hk = 2, sq = 300, d = 64, causal = true, window = [128, 0], softcap = 30 },
    { hq = 8, sq = 300, d = 64, window = [-1, 5], scale = 0.5, dtype = "fp16" },
]
"""
TABLES = """
[[problems]]
hq = 8
sq = 300
d = 64
"""


def written(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


needs_tomllib = pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")


@needs_tomllib
def test_toml(tmp_path):
    lines = ["hq=8,sq=300,d=64", "b=2,hq=8,hk=2,sq=300,d=64,window=128:0,softcap=30", "hq=8,sq=300,d=64,window=:5"]
    expected = [*map(shapes.parse, lines[:2]), shapes.parse(lines[2] + ",scale=0.5,dtype=fp16")]
    assert shapes.load(written(tmp_path, "a.toml", TOML)) == expected
    assert shapes.load(str(written(tmp_path, "b.toml", TABLES))) == expected[:1]


def test_json(tmp_path):
    items = ["hq=8,sq=300,d=64", {"hq": 8, "sq": 300, "d": 64, "window": [None, 5], "causal": False}]
    expected = [shapes.parse("hq=8,sq=300,d=64"), shapes.parse("hq=8,sq=300,d=64,window=:5")]
    assert shapes.load(written(tmp_path, "a.json", json.dumps(items))) == expected
    assert shapes.load(written(tmp_path, "b.json", json.dumps({"problems": items}))) == expected


GOOD = '{"hq": 8, "sq": 300, "d": 64}'


@pytest.mark.parametrize(
    ("name", "text", "at_fault", "said"),
    [
        ("a.json", f"[{GOOD}, {GOOD[:-1]}, \"d\": 60}}]", "a.json, problem 2", "a multiple of 8"),
        ("a.json", '[{"hq": 8, "sq": 300, "d": 60}]', "d in ", "a multiple of 8"),
        ("a.json", f'[{GOOD}, "hq=8,sq=300,d=64,softcap=x"]', "a.json, problem 2: softcap in", "received x"),
        ("a.json", f'[{GOOD}, {{"hq": true, "sq": 300, "d": 64}}]', "hq in ", "received True"),
        ("a.json", f'[{GOOD[:-1]}, "b": 2.0}}]', "b in ", "received 2.0"),
        ("a.json", f'[{GOOD[:-1]}, "window": 5}}]', "window in ", "LEFT:RIGHT"),
        ("a.json", f'[{GOOD[:-1]}, "window": [1, 2, 3]}}]', "window in ", "LEFT:RIGHT"),
        ("a.json", f'[{GOOD[:-1]}, "window": [1.5, 2]}}]', "window in ", "LEFT:RIGHT"),
        ("a.json", f'[{GOOD[:-1]}, "dtype": ["bf16"]}}]', "dtype in ", "bf16 or fp16"),
        ("a.json", f'[{GOOD[:-1]}, "scale": true}}]', "scale in ", "a number"),
        ("a.json", f'[{GOOD[:-1]}, "softcap": null}}]', "softcap in ", "received None"),
        ("a.json", f'[{GOOD[:-1]}, "headdim": 64}}]', "a.json, problem 1", "the key 'headdim'"),
        ("a.json", "[3]", "a.json, problem 1", "received 3"),
        ("a.json", "[]", "a.json", "no problems"),
        ("a.json", "{}", "a.json", "a list `problems`"),
        ("a.json", f'{{"problems": [{GOOD}], "jobs": 3}}', "a.json", "['jobs', 'problems']"),
        ("a.json", '{"problems": 3}', "a.json", "a list `problems`"),
        ("a.json", "3", "a.json", "a int"),
        ("a.json", "[", "a.json", "JSON"),
        ("a.json", "[" * 100_000, "a.json", "JSON"),
        pytest.param("a.toml", "problems = [", "a.toml", "TOML", marks=needs_tomllib),
        ("a.yaml", "problems:", "a.yaml", ".toml, .json or .txt"),
        ("absent.json", None, "absent.json", "No such file"),
    ],
)  # fmt: skip
def test_errors_name_the_file_the_problem_and_the_key(tmp_path, name, text, at_fault, said):
    if text is not None:
        written(tmp_path, name, text)
    with pytest.raises(ArgumentError) as caught:
        shapes.load(tmp_path / name)
    assert at_fault in str(caught.value) and said in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_toml_before_python_3_11(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomllib", None)
    with pytest.raises(ToolchainError, match=r"Python 3\.11"):
        shapes.load(written(tmp_path, "a.toml", TABLES))
