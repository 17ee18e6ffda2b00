"""Messages for what goes wrong with a launcher itself rather than with one of its jobs (group `launcher`)."""

from __future__ import annotations

from hydra.errors import MissingConfigException

# Hydra launchers that are separate packages, and the extra that installs each.
EXTRAS = {"joblib": "joblib", "submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "ray"}


def not_installed(error: Exception) -> str | None:
    """A message saying what to install for a launcher that Hydra cannot find; None for any other error."""
    if not isinstance(error, MissingConfigException) or error.missing_cfg_file is None:
        return None
    group, _, name = error.missing_cfg_file.rpartition("/")
    if group != "hydra/launcher" or name not in EXTRAS:
        return None
    return f"hydra/launcher={name}: not installed; pip install 'morphtrain[{EXTRAS[name]}]'"


def failed(error: Exception) -> str | None:
    """A message for an error raised inside a launcher's package; None for an error from a job or from MorphTrain."""
    traceback = error.__traceback__
    while traceback is not None:
        package = traceback.tb_frame.f_globals.get("__name__", "").split(".")
        if len(package) > 1 and package[0] == "hydra_plugins" and package[1].endswith("_launcher"):
            launcher = package[1].removeprefix("hydra_").removesuffix("_launcher")
            return f"hydra/launcher: {launcher} could not run the jobs: {error}"
        traceback = traceback.tb_next
    return None
