"""What runs where Triton cannot be imported, for processes of their own, see fresh_process.py."""

import sys


def failures() -> dict[str, str]:
    """Of the doctor's runs of all ops on the CPU, what those raise that fail, by name."""
    sys.modules["triton"] = None
    import pack  # noqa: F401
    import torch
    from turbodiffusion_pack.kernels import dispatch
    from turbodiffusion_pack.turbo_core import diagnosis

    assert not dispatch.has_triton()
    failed = {}
    for name, run in diagnosis.trials(torch.device("cpu")).items():
        try:
            run("auto")
        except Exception as error:
            failed[name] = repr(error)
    return failed
