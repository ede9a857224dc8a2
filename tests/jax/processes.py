"""Environments of the processes that tests start."""

import os


def with_devices(n: int) -> dict[str, str]:
    """`n` devices on the CPU, and programs compiled as quickly as in the tests themselves."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={n}"
    return {**os.environ, "XLA_FLAGS": flags}
