"""A whole run, or several, as one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rtk.benchmarks.records import Run
from rtk.benchmarks.report import name, need, standing
from rtk.benchmarks.report.table import detail, sheets

__all__ = ["render"]

_TEMPLATE = Path(__file__).with_name("report.html.j2")


def render(runs: Sequence[Run], plots: Mapping[str, Sequence[tuple[str, bytes]]] | None = None) -> str:
    """The page. plots: {suite: [(name, PNG)]}, which are put into the page itself.

    ToolchainError where jinja2 is missing.
    """
    jinja2 = need("jinja2")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    sections = [_section(run, (plots or {}).get(run.suite, ())) for run in runs]
    gpus = sorted({run.gpu for run in runs})
    return str(template.render(gpus=", ".join(gpus), sections=sections, date=max(_date(run) for run in runs)))


def _section(run: Run, plots: Sequence[tuple[str, bytes]]) -> dict[str, Any]:
    every = detail(run)
    return {
        "id": run.suite,
        "title": str(run.meta.get("title") or run.suite),
        "gpu": run.gpu,
        "standing": standing(run.records),
        "sheets": sheets(run),
        "detail": every if every.rows else None,
        "plots": [(plot, base64.b64encode(png).decode("ascii")) for plot, png in plots],
        "facts": _facts(run.meta),
        "absent": [(name(impl), reason) for impl, reason in (run.meta.get("absent") or {}).items()],
    }


def _date(run: Run) -> str:
    return str(run.meta.get("date") or "?")


def _facts(meta: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known of a run, as (name, text): card, versions, ceilings, clocks, sources, method."""
    ceilings, device, clocks = (meta.get(key) or {} for key in ("ceilings", "device", "clocks"))
    facts = [
        ("GPU", f"{meta.get('gpu', '?')}, {meta.get('uuid', '')}"),
        ("SMs, highest clock", f"{device.get('sm_count', '?')}, {device.get('max_sm_mhz', '?')} MHz"),
        ("driver, CUDA", f"{meta.get('driver', '?')}, {meta.get('cuda', '?')}"),
        ("date", _date_and_duration(meta)),
        ("rounds", f"{meta.get('rounds', '?')}, in {meta.get('pieces', 1)} pieces"),
        ("versions", _listed(meta.get("versions") or {})),
        ("ceilings, measured", _ceilings(ceilings)),
        ("SM clock, MHz", _range(clocks.get("sm_mhz"))),
        ("power, W", _range(clocks.get("power_w"))),
        ("temperature, °C", _range(clocks.get("temperature_c"))),
        ("sources, SHA-256", _listed({key: str(value)[:16] for key, value in (meta.get("sources") or {}).items()})),
        ("method", str(meta.get("method") or "")),
    ]
    return [(key, text) for key, text in facts if text.strip(" ,?")]


def _date_and_duration(meta: Mapping[str, Any]) -> str:
    duration = meta.get("duration_s")
    return str(meta.get("date") or "?") + (f", took {duration:,.0f} s" if duration else "")


def _ceilings(ceilings: Mapping[str, Any]) -> str:
    units = {"bf16_tflops": "bfloat16 {:,.0f} TFLOP/s", "fp8_tflops": "fp8 {:,.0f} TFLOP/s"}
    units["copy_gbps"] = "copy {:,.0f} GB/s, read and written"
    return ", ".join(unit.format(ceilings[key]) for key, unit in units.items() if ceilings.get(key))


def _range(values: Any) -> str:
    if not isinstance(values, dict):
        return ""
    return ", ".join(f"{key} {value:,.0f}" for key, value in values.items() if value is not None)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value)
