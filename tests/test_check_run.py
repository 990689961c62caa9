"""What rtk.check_run finds in a kernel's results, and the bounded tables behind rtk.run: on a GPU that is NumPy."""

from __future__ import annotations

import contextlib
import re
import threading

import numpy as np
import pytest
from own_kernel import FakeGpu, at, import_files, inputs, rmsnorm

import rtk
from rtk import launch, toolkit
from rtk.errors import ArgumentError


@pytest.fixture
def own(tmp_path, monkeypatch):
    return import_files(tmp_path, monkeypatch)[0]


@pytest.fixture
def fake(own, monkeypatch):
    return FakeGpu(monkeypatch, own.RmsNormParams, rmsnorm)


# --- what check_run finds ---------------------------------------------------------------------------------------------


def test_check_run_finds_nothing_in_a_right_kernel(own, fake):
    for shape in ((1, 8), (7, 1001), (33, 1000), (0, 64)):
        for dtype in ("float16", "bfloat16"):
            assert rtk.check_run(own.SPEC, inputs(*shape, dtype), eps=0.5) == []
    edge = inputs()
    edge["x"][0], edge["x"][1, 3], edge["x"][2, 5], edge["weight"][7] = 0, np.nan, np.inf, 60000
    with np.errstate(all="ignore"):
        assert rtk.check_run(own.SPEC, edge) == []


def last_column_missing(y, x, weight, params):
    y[:, -1] = np.nan


def one_element_twice_rounded(y, x, weight, params):
    y[1, 3] = np.nextafter(np.nextafter(y[1, 3], np.float16(9)), np.float16(9))


def beyond_the_end(y, x, weight, params):
    at(params.y + 2 * params.rows * params.y_stride, (1,), (1,), np.float16)[0] = 1


def before_the_beginning(y, x, weight, params):
    at(params.y - 2, (1,), (1,), np.float16)[0] = 1


def into_an_input(y, x, weight, params):
    weight[5] = 0


FAULTS = {
    last_column_missing: r"y: 5 of 320 elements are off, worst at \(0, 63\): nan, should be",
    one_element_twice_rounded: r"y: 1 of 320 elements are off, worst at \(1, 3\)",
    beyond_the_end: "y: the kernel wrote outside it",
    before_the_beginning: "y: the kernel wrote outside it",
    into_an_input: "weight: the kernel changed it",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_check_run_finds(own, monkeypatch, fault):
    def kernel(params, launched):
        rmsnorm(params, launched)
        shape = (params.rows, params.columns)
        arrays = [
            at(params.y, shape, (params.y_stride, 1), np.float16),
            at(params.x, shape, (params.x_stride, 1), np.float16),
        ]
        fault(*arrays, at(params.weight, shape[1:], (1,), np.float16), params)

    FakeGpu(monkeypatch, own.RmsNormParams, kernel)
    configs = own.SPEC.configs(own.RmsNormProblem(5, 64, "float16", 1e-6))[:1]
    found = rtk.check_run(own.SPEC, inputs(), configs=configs)
    assert all(said.startswith(own.SPEC.label(configs[0])) for said in found)
    assert any(re.search(FAULTS[fault], said) for said in found), found
    assert len(found) == 1 or fault is into_an_input, "which also makes the second run another"


def test_check_run_finds_other_bits(own, monkeypatch):
    calls = []

    def kernel(params, launched):
        rmsnorm(params, launched)
        calls.append(1)
        y = at(params.y, (params.rows, params.columns), (params.y_stride, 1), np.float16)
        if len(calls) == 2:
            y[0, 0] = np.nextafter(y[0, 0], np.float16(9))

    FakeGpu(monkeypatch, own.RmsNormParams, kernel)
    configs = own.SPEC.configs(own.RmsNormProblem(5, 64, "float16", 1e-6))[:1]
    (found,) = rtk.check_run(own.SPEC, inputs(), configs=configs, ulps=2)
    assert found.endswith("y: a repeat gives other bits")
    calls.clear()
    assert rtk.check_run(own.SPEC, inputs(), configs=configs, ulps=2, repeatable=False) == []


def test_check_run_needs_a_gpu(own):
    with pytest.raises(ArgumentError, match="x: received an array on the CPU"):
        rtk.check_run(own.SPEC, inputs())


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_is_bounded_and_keeps_what_is_used():
    table = launch.Recent(100)
    for key in range(1000):
        table.put(key, str(key))
        assert table.get(key) == str(key)
        assert len(table) <= 100
        table.get(0)
    assert table.get(0) == "0", "what is used again and again stays"
    assert all(table.get(key) == str(key) for key in range(960, 1000)), "so does what came last"
    assert table.get(500) is None
    table.clear()
    assert len(table) == 0 and table.get(0) is None


def test_a_table_is_shared_by_threads():
    table, wrong = launch.Recent(64), []

    def work(start):
        for turn in range(20_000):
            key = (start + turn * 7) % 200
            found = table.get(key)
            if found is None:
                table.put(key, str(key))
            elif found != str(key):
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(table) <= 64 + 4


def test_many_shapes_do_not_grow_the_tables(own, fake, monkeypatch):
    monkeypatch.setattr(toolkit, "_calls", launch.Recent(10))
    for rows in range(1, 60):
        rtk.run(own.SPEC, inputs(rows, 8))
        plans = rtk.stats()["plans"]
        rtk.run(own.SPEC, inputs(1, 8))
        assert rtk.stats()["plans"] == plans, "the shape in use is not forgotten"
    assert len(toolkit._calls) <= 10


def test_maps_of_all_plans_are_bounded_together(monkeypatch):
    monkeypatch.setattr(launch._Maps, "_encoded", launch.Recent(20))
    encoded = []
    monkeypatch.setattr("rtk.driver.on_device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr("rtk.tma.encode", lambda pointer, *_: encoded.append(pointer) or bytes([pointer % 251]) * 128)
    operand = rtk.TensorOperand("x", "float16", (8, 8), (1, 8), (8, 8))
    maps = [launch._Maps(operand, 0) for _ in range(3)]
    for pointer in range(16, 1616, 16):
        for one in maps:
            assert one.at(pointer) == one.at(pointer) == bytes([pointer % 251]) * 128
    assert len(encoded) == 300 and len(launch._Maps._encoded) <= 20
    for pointer in (0, 8, 24):
        with pytest.raises(launch.MisalignedError, match=r"x: received an array at address .*a multiple of 16"):
            maps[0].at(pointer)
