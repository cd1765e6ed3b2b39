"""Energy of a run: counted by the GPU where it can, else estimated from watts that the user gives.

Processors have counters too (RAPL). Since Linux 5.10 only the superuser may read them, and the kept-up
libraries that do (zeus, codecarbon) bring pandas and a dozen other packages, or replace an unreadable counter
by a guess of their own. So a run on a processor has an estimate, labelled as one, or no energy at all.
"""

from collections.abc import Callable

import torch

JOULES_PER_WATT_HOUR = 3600
MEASURED, ESTIMATED = "measured by the GPU's counter", "estimated from --watts"
"""How the energy of a run is known."""


def joules_counter(device: torch.device | str) -> Callable[[], float] | None:
    """Return a function that reads the joules that a device has used since its driver was loaded.

    Returns:
        None where there is no such counter: not a GPU of NVIDIA, one older than Volta, or nvidia-ml-py is not
        installed.
    """
    if torch.device(device).type != "cuda" or torch.version.cuda is None:
        return None
    try:
        import pynvml
    except ModuleNotFoundError:
        return None
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    try:
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError_NotSupported:
        return None
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3


def check_energy_known(grid_intensity: float | None, watts: float | None, device: torch.device | str) -> None:
    """Refuse to compute carbon from an energy that nobody knows.

    Args:
        grid_intensity: grams of CO2 equivalent per kilowatt hour; None if no carbon is wanted.
        watts: what the machine draws; None if the user does not say.
        device: where the run trains.

    Raises:
        ValueError: carbon is wanted, there is no counter, and no watts.
    """
    if grid_intensity is not None and watts is None and joules_counter(device) is None:
        raise ValueError(
            f"--grid-intensity: {device} has no energy counter that can be read (a GPU of NVIDIA has one; "
            f"nvidia-ml-py reads it); give --watts, what the machine draws while it trains"
        )


def carbon_grams(joules: float, grid_intensity: float) -> float:
    """Grams of CO2 equivalent.

    Args:
        joules: of the run.
        grid_intensity: grams per kilowatt hour.

    >>> carbon_grams(3_600_000, 400.0)
    400.0
    """
    return joules / JOULES_PER_WATT_HOUR / 1000 * grid_intensity
