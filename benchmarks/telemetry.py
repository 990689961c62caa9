"""The GPU's SM clock, power and temperature while something runs, read by NVML in a thread."""

from __future__ import annotations

import contextlib
import statistics
import threading
from typing import Any

_EVERY_S = 0.02


class Telemetry:
    """Samples between `start` and `stop`; nothing where NVML's Python library is missing, and `reason` says so."""

    def __init__(self, uuid: str) -> None:
        self.reason: str | None = None
        self._samples: list[tuple[float, float, float]] = []
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml: Any = pynvml
            self._device = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except Exception as error:  # not installed, no driver, a device it does not name
            self.reason = f"clocks are not known: {type(error).__name__}: {error}"

    def __enter__(self) -> Telemetry:
        if self.reason is None:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def max_sm_mhz(self) -> int | None:
        """The highest SM clock the card is allowed."""
        if self.reason is not None:
            return None
        return int(self._nvml.nvmlDeviceGetMaxClockInfo(self._device, self._nvml.NVML_CLOCK_SM))

    def versions(self) -> dict[str, str]:
        """Of the driver."""
        return {} if self.reason is not None else {"driver": str(self._nvml.nvmlSystemGetDriverVersion())}

    def take(self) -> dict[str, float]:
        """Medians of what was sampled since the last time: sm_mhz, power_w, temperature_c; {} where nothing was."""
        samples, self._samples = self._samples, []
        if not samples:
            return {}
        names = ("sm_mhz", "power_w", "temperature_c")
        return {
            name: round(statistics.median(values), 1)
            for name, values in zip(names, zip(*samples, strict=True), strict=True)
        }

    def _power_w(self) -> float:
        """Of this moment where the driver tells it; nvmlDeviceGetPowerUsage is an average over a second."""
        with contextlib.suppress(AttributeError, self._nvml.NVMLError):  # an older library or driver
            (found,) = self._nvml.nvmlDeviceGetFieldValues(self._device, [self._nvml.NVML_FI_DEV_POWER_INSTANT])
            if found.nvmlReturn == 0 and found.value.uiVal:
                return float(found.value.uiVal) / 1e3
        return float(self._nvml.nvmlDeviceGetPowerUsage(self._device)) / 1e3

    def _sample(self) -> None:
        nvml, device = self._nvml, self._device
        while not self._over.wait(_EVERY_S):
            try:
                clock = nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM)
                power = self._power_w()
                temperature = nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU)
            except nvml.NVMLError:
                continue
            self._samples.append((float(clock), power, float(temperature)))
