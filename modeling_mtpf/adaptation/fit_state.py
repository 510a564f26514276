"""State of a fit on disk: a stopped fit resumes where it was last validated, with the same result."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from ..errors import MtpfError
from ..files import write_atomically


class FitState:
    """State of one training in a file; it is read once, and written at each evaluation.

    Attributes:
        step: Steps taken before the fit was stopped; 0 without a file.
        values: What `write` wrote with it.

    Raises:
        MtpfError: The file is of a fit with other settings or data, or cannot be read.
    """

    def __init__(self, path: Path, identity: str):
        self._path, self._identity = path, identity
        self.step, self.values = 0, {}
        if not path.is_file():
            return
        try:
            stored: dict[str, Any] = torch.load(path, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise MtpfError(f"{path} cannot be read; delete {path.parent} to fit from the start.") from error
        if stored["identity"] != identity:
            raise MtpfError(
                f"{path.parent} holds a stopped fit with other settings or data; repeat its command to "
                "resume it, or delete the folder."
            )
        self.step, self.values = stored["step"], stored["values"]

    def write(self, step: int, **values: Any) -> None:
        """Replace the file by the state after a step: tensors, numbers, and lists and dicts of such."""
        content = {"identity": self._identity, "step": step, "values": values}
        write_atomically(self._path, lambda file: torch.save(content, file))


class FitStates:
    """States of all trainings of a fit, in a hidden folder next to its result until that is saved.

    Args:
        result: Folder in which the result will be saved.
        identity: Digest of all that the fit depends on.
    """

    def __init__(self, result: Path, identity: str):
        self.folder = result.with_name(f".{result.name[:200]}.fit")
        self._identity, self._count, self._seed = identity, 0, 0

    def start(self, seed: int) -> None:
        """Begin the fit with a seed."""
        self._count, self._seed = 0, seed

    def next(self) -> FitState:
        """Return the state of the next training of the fit."""
        self._count += 1
        return FitState(self.folder / f"{self._seed}-{self._count}.pt", self._identity)

    def remove(self) -> None:
        """Delete the folder once the result is saved."""
        shutil.rmtree(self.folder, ignore_errors=True)
