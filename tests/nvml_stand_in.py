"""The text of a module in the place of NVML's, since no machine of the tests has a card: every reading is known."""

NVML = """
class NVMLError(Exception): pass
NVML_TEMPERATURE_GPU = 0
class _Rates: gpu = 37
class _Memory: used = 3 * 2**30; total = 24 * 2**30
def nvmlInit(): pass
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetName(handle): return b"NVIDIA Test"
def nvmlDeviceGetUtilizationRates(handle): return _Rates
def nvmlDeviceGetMemoryInfo(handle): return _Memory
def nvmlDeviceGetTemperature(handle, sensor): return 55
def nvmlDeviceGetPowerUsage(handle): return 150000
"""
