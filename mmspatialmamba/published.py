"""Published models by name, such as ``spatialmamba://cls_sm_t``: what the metafile says of them, and their weights."""

import os
import re
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from urllib.parse import urlparse

import yaml

from .configs import config_path
from .download import DownloadError, cached, check_hash, download, drive_id, on_every_rank, only_file

SCHEMES = ('spatialmamba', 'vmamba')
"""The scheme of each backbone's names: the name of its collection in the metafile, without hyphens."""

FOLDER_VARIABLE = 'MMSPATIALMAMBA_WEIGHTS'
"""Environment variable that names a folder of weights, which comes before any download."""


@dataclass(frozen=True)
class PublishedModel:
    """A model of the metafile.

    Attributes:
        name: Its name with the scheme, such as ``spatialmamba://cls_sm_t``.
        config: File name of its config.
        metrics: Published metrics, in per cent.
        address: Where its weights are: a file, or a page of Google Drive.
        file: Name of the file of weights, if the address ends in it or the metafile states it as ``File``.
        sha256: SHA-256 of the file or its beginning, if the metafile states it as ``SHA256``.
    """

    name: str
    config: str
    metrics: dict[str, float]
    address: str
    file: str | None
    sha256: str | None

    @property
    def short_name(self) -> str:
        """The name without the scheme."""
        return self.name.partition('://')[2]


@cache
def published_models() -> dict[str, PublishedModel]:
    """Returns the models of the metafile whose weights are published, by their names with the scheme."""
    models = {}
    for entry in yaml.safe_load(Path(config_path('metafile.yml')).read_text())['Models']:
        name = f'{entry["In Collection"].replace("-", "")}://{entry["Name"]}'
        address = entry['Weights']
        models[name] = PublishedModel(
            name,
            Path(entry['Config']).name,
            {metric: value for result in entry['Results'] for metric, value in result['Metrics'].items()},
            address,
            entry.get('File') or (None if drive_id(address) else Path(urlparse(address).path).name),
            entry.get('SHA256'),
        )
    return models


def find_model(name: str) -> PublishedModel:
    """Returns the model of a name such as ``spatialmamba://cls_sm_t``.

    Raises:
        KeyError: There is none.
    """
    models = published_models()
    if name not in models:
        scheme = name.partition('://')[0]
        known = ', '.join(model.short_name for known, model in models.items() if known.startswith(f'{scheme}://'))
        raise KeyError(f'{name}: expected {scheme}:// and the name of a published model, which are {known or "none"}')
    return models[name]


def find_weights(model: PublishedModel) -> Path:
    """Returns the file of a model's weights, on every rank; it is downloaded if it is not there.

    The folder that ``MMSPATIALMAMBA_WEIGHTS`` names comes first, see `put_by_hand`.

    Raises:
        DownloadError: The file cannot be had: the page, the file and the folder to put it into are named.
    """
    try:
        return on_every_rank(partial(_find, model))
    except DownloadError as error:
        folder = os.environ.get(FOLDER_VARIABLE)
        where = (
            f'{folder}, which {FOLDER_VARIABLE} names'
            if folder
            else f'a folder that the environment variable {FOLDER_VARIABLE} names'
        )
        place = cached(model.address)
        others = f'under any name into {place}' if drive_id(model.address) else f'into {place.parent}'
        raise DownloadError(
            f'{model.name}: expected its weights, found none that can be used ({error}). By hand: download '
            f'{model.address} in a browser, and put the file as {model.file or f"{model.short_name}.pth"} into '
            f'{where}, or {others}'
        ) from error


def _find(model: PublishedModel) -> Path:
    path = put_by_hand(model)
    if path is None:
        return download(model.address, model.sha256)
    check_hash(path, model.sha256)
    return path


def put_by_hand(model: PublishedModel) -> Path | None:
    """Returns a model's file in the folder that ``MMSPATIALMAMBA_WEIGHTS`` names, or None.

    It has the name of the published file, or that of the model (``cls_sm_t.pth``, ``.safetensors``, a hash before the
    ending as `tools/convert_checkpoint.py` writes it), or any name in a folder with the name of the model.

    Raises:
        DownloadError: The folder does not exist, or holds several such files.
    """
    if not os.environ.get(FOLDER_VARIABLE):
        return None
    folder = Path(os.environ[FOLDER_VARIABLE]).expanduser()
    if not folder.is_dir():
        raise DownloadError(f'{FOLDER_VARIABLE}: expected a folder, found none at {folder}')
    name = model.short_name
    named = re.compile(rf'{re.escape(name)}(-[0-9a-f]{{8,64}})?\.(pth|safetensors)')
    files = [path for path in sorted(folder.iterdir()) if path.name == model.file or named.fullmatch(path.name)]
    files += filter(None, [only_file(folder / name)])
    if len(files) > 1:
        raise DownloadError(f'{folder}: expected one file of {name}, found {", ".join(map(str, files))}')
    return files[0] if files else None
