"""The models that come with hemafed: trained on synthetic heads alone (simulations/heads), for federations to begin with.

`model.pretrained = "synthetic"` takes every weight from `starting/<variant>.safetensors`. Every site has the files, so the
initial model is still decided by the run config, and a hospital can check it. The same form of file holds a model that a run
exported.

Nothing here is of a patient. A file's metadata is its card: variant, windows_hu, data, and how it was made and measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shared.config import ConfigError, ModelSettings
from shared.errors import HemafedError
from shared.model.swin import VARIANTS, MultiTaskSwin

_PLACE = Path("shared", "model", "starting")


class StartingModelError(HemafedError, ValueError):
    """A file with a model is missing, damaged or does not fit; names the file and the next step."""


@dataclass(frozen=True)
class Card:
    """What a model file says of itself.

    Attributes:
      settings: variant and windows.
      facts: everything in the file's metadata.
    """

    settings: ModelSettings
    facts: dict[str, str]


def starting_file(variant: str) -> Path:
    """Return the file of a variant's starting model.

    Raises:
      StartingModelError: none is installed for it.
    """
    for folder in _folders():
        path = folder / f"{variant}.safetensors"
        if path.is_file():
            return path
    there = sorted({path.stem for folder in _folders() for path in folder.glob("*.safetensors")})
    raise StartingModelError(
        f"model.pretrained is 'synthetic', and hemafed brings no starting model for model.variant = {variant!r}; "
        f"expected one of {', '.join(there) or 'none (they are missing in this installation)'}, or model.pretrained = ''"
    )


def _folders() -> Iterator[Path]:
    """Where the files may be: beside this module, or where hemafed is installed.

    Flower unpacks a run's code elsewhere, without anything but Python.
    """
    yield Path(__file__).parent / "starting"
    try:
        installed = distribution("hemafed")
    except PackageNotFoundError:
        return
    yield Path(str(installed.locate_file(_PLACE)))
    origin = urlparse(json.loads(installed.read_text("direct_url.json") or "{}").get("url", ""))
    if origin.scheme == "file":
        yield Path(url2pathname(origin.path)) / _PLACE


def read_card(path: Path) -> Card:
    """Read what a model file says of itself.

    Raises:
      StartingModelError: no such file, not safetensors, or without a usable card.
    """
    if not path.is_file():
        raise StartingModelError(f"there is no model file {path}; correct the path")
    try:
        with safe_open(path, framework="pt") as file:
            facts = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise StartingModelError(f"{path} is not a safetensors file ({error}); copy it again") from error
    settings = ModelSettings(variant=facts.get("variant", ""), windows_hu=facts.get("windows_hu", ""))
    try:
        known = bool(settings.windows()) and settings.variant in VARIANTS
    except ConfigError:
        known = False
    if not known:
        raise StartingModelError(
            f"{path} says variant {settings.variant!r:.60} and windows_hu {settings.windows_hu!r:.60} of itself; expected one of "
            f"{', '.join(VARIANTS)} and windows such as '0:80', as `hemafed-server export` writes them"
        )
    return Card(settings, facts)


def load_starting(model: MultiTaskSwin, path: Path, settings: ModelSettings) -> None:
    """Put a file's weights into a model, in place.

    Args:
      model: of settings.variant.
      path: of a model file.
      settings: what the model is to be; the file's variant and windows must be the same.
    Raises:
      StartingModelError: the file is missing or damaged, or of another variant or other windows.
    """
    card = read_card(path)
    if card.settings.variant != settings.variant or card.settings.windows() != settings.windows():
        raise StartingModelError(
            f"{path} was trained as model.variant = {card.settings.variant!r} with model.windows_hu = "
            f"{card.settings.windows_hu!r}, and the run has {settings.variant!r} and {settings.windows_hu!r}; set both as the file has them"
        )
    _load_tensors(model, path)


def _load_tensors(model: MultiTaskSwin, path: Path) -> None:
    """Put the file's tensors into a model, in place; fp16 becomes the model's dtype.

    Raises:
      StartingModelError: a tensor is missing, of another shape or not finite.
    """
    own = model.state_dict()
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        tensors = {name: file.get_tensor(name) for name in own if name in names}
    for name, value in own.items():
        if name not in tensors:
            raise StartingModelError(f"{path} lacks tensor {name}; expected the model's {len(own)} tensors")
        _check(path, name, tensors[name], value)
    model.load_state_dict(tensors)


def read_model(path: Path) -> tuple[MultiTaskSwin, Card]:
    """A file's whole model, ready to answer.

    Raises:
      StartingModelError: the file is missing or damaged, or lacks a part.
    """
    card = read_card(path)
    model = MultiTaskSwin(VARIANTS[card.settings.variant], in_channels=len(card.settings.windows()))
    _load_tensors(model, path)
    return model.eval(), card


def write_model(
    path: Path,
    model: MultiTaskSwin,
    settings: ModelSettings,
    facts: Mapping[str, object],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a model file: every tensor, and its card.

    Args:
      path: of the file; replaced in one step.
      model, settings: what is written.
      facts: the rest of the card.
      dtype: of the tensors.
    """
    own = {"variant": settings.variant, "windows_hu": settings.windows_hu}
    card = own | {name: str(value) for name, value in facts.items()}
    tensors = {name: value.to(dtype).contiguous() for name, value in model.state_dict().items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata=card)
    partial.replace(path)


def _check(path: Path, name: str, found: Tensor, own: Tensor) -> None:
    if found.shape != own.shape or not bool(found.isfinite().all()):
        raise StartingModelError(
            f"{path}: tensor {name} is {tuple(found.shape)}, expected {tuple(own.shape)} with finite values; copy the file again"
        )
