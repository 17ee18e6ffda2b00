"""What a test could leave behind in its process for the next one."""

from __future__ import annotations

import logging
import os
import signal
import sys
import urllib.request
from typing import Any

import torch
from hydra.core.global_hydra import GlobalHydra

from morphtrain.tracking import store, wandb

KEYS_OF_OTHERS = {
    "PYTEST_CURRENT_TEST",
    *("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"),  # set where scikit-learn is imported
    "TORCHINDUCTOR_CACHE_DIR",  # set where torchvision is imported
    *store.ENVIRONMENT,  # set where MLflow is imported, and stays
    *wandb.ENVIRONMENT,  # likewise
    "KINETO_LOG_LEVEL",  # set where steps are profiled
}


def process_state() -> dict[str, Any]:
    """All of it that is cheap to ask for, by name."""
    root = logging.getLogger()
    return {
        "directory": (os.getcwd(), {name for name in os.listdir() if not name.startswith(".")}),
        "environment": {key: value for key, value in os.environ.items() if key not in KEYS_OF_OTHERS},
        "signals": {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)},
        "cores": os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None,
        "import path": list(sys.path),
        "logging": (root.level, list(root.handlers), logging.root.manager.disable),
        "proxies": urllib.request._opener,
        "Hydra": GlobalHydra.instance().is_initialized(),
        "torch": (
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.benchmark,
            torch.backends.mkldnn.enabled,
        ),
    }
