"""Downloads of checkpoints into PyTorch's folder: one file for each address, checked by its hash, on every rank."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import torch
from mmengine import dist
from mmengine.logging import print_log

HASH = re.compile(r'-(?!(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\.)([0-9a-f]{8,64})\.[^.]+$')
"""The beginning of the SHA-256 of a file, at the end of its name, as PyTorch and OpenMMLab write it; no date."""

GDOWN = 'gdown>=6.5'
"""What downloads from Google Drive, in `requirements/weights.txt` too: earlier versions cannot time out."""

UNFINISHED = ('.part', '.crdownload')
"""Endings of what gdown and browsers have not yet downloaded."""


class DownloadError(RuntimeError):
    """A file cannot be had, or is not the one that was expected."""


def on_every_rank(find: Callable[[], Path]) -> Path:
    """Calls what finds a file on every rank, on rank 0 before the others, so that they find what it downloaded.

    Where a node does not share its files with that of rank 0, its processes find the file for themselves.

    Raises:
        DownloadError: On every rank, if one of them does not find the file.
    """

    def attempt() -> tuple[Path | None, str]:
        try:
            return find(), ''
        except Exception as error:
            return None, str(error) if isinstance(error, DownloadError) else f'{type(error).__name__}: {error}'

    path, failure = attempt() if dist.get_rank() == 0 else (None, '')
    failures = [failure]
    dist.broadcast_object_list(failures)
    if not failures[0]:
        if dist.get_rank() != 0:
            path, failure = attempt()
        failures = dist.all_gather_object(failure)
    if any(failures):
        raise DownloadError(next(filter(None, failures)))
    return path


def download(address: str, sha256: str | None = None) -> Path:
    """Returns the file of an address, which is downloaded if it is not there yet.

    Args:
        address: Of a file, or of a file's page on Google Drive, which gdown downloads.
        sha256: SHA-256 of the file, or its beginning; a hash in the file's own name comes first.

    Raises:
        DownloadError: The file cannot be downloaded, or is not the one that the hash says.
    """
    place = cached(address)
    path = only_file(place)
    if path is not None:
        check_hash(path, sha256)
        return path
    place.parent.mkdir(parents=True, exist_ok=True)
    if drive_id(address):
        path = _download_from_drive(address, place)
        try:
            check_hash(path, sha256)
        except DownloadError:
            path.unlink()
            raise
    else:
        path, match = place, HASH.search(place.name)
        torch.hub.download_url_to_file(address, str(path), hash_prefix=match[1] if match else sha256)
    print_log(
        f'Downloaded {address} to {path}: {path.stat().st_size / 1e6:.1f} MB, SHA-256 {_sha256(path)}',
        logger='current',
    )
    return path


def cached(address: str) -> Path:
    """Returns where the file of an address lies once it is downloaded: its path, or its folder for Google Drive.

    A name with a hash is unique, and lies where ``torch.hub`` puts it. Any other lies in a folder whose name is made
    from the address. Google Drive tells a file's name with the file, so for its pages only the folder is known before.
    """
    name = Path(unquote(urlparse(address).path)).name
    folder = Path(torch.hub.get_dir(), 'checkpoints')
    drive = drive_id(address)
    own = folder / hashlib.sha256((drive or address).encode()).hexdigest()[:8]
    if drive:
        return own
    return (folder if HASH.search(name) else own) / name


def drive_id(address: str) -> str | None:
    """Returns the id of a file on Google Drive by the address of its page or download, None for other addresses."""
    parts = urlparse(address)
    if parts.hostname not in ('drive.google.com', 'docs.google.com', 'drive.usercontent.google.com'):
        return None
    match = re.match(r'/file(?:/u/\d+)?/d/([-\w]+)', parts.path)
    return match[1] if match else parse_qs(parts.query).get('id', [None])[0]


def only_file(place: Path) -> Path | None:
    """Returns the file at a place: itself, or what a folder holds; None if there is none.

    Raises:
        DownloadError: The folder holds several files.
    """
    if not place.is_dir():
        return place if place.is_file() else None
    files = [
        path
        for path in sorted(place.iterdir())
        if path.is_file() and not path.name.startswith('.') and path.suffix not in UNFINISHED
    ]
    if len(files) > 1:
        raise DownloadError(f'{place}: expected one file, found {", ".join(path.name for path in files)}')
    return files[0] if files else None


def check_hash(path: Path, sha256: str | None = None) -> None:
    """Raises a DownloadError if the SHA-256 of a file does not begin as its name says, or else as ``sha256`` says."""
    match = HASH.search(path.name)
    expected, source = (match[1], 'its name') if match else (sha256, 'the metafile')
    if expected is None:
        return
    found = _sha256(path)
    if not found.startswith(expected.lower()):
        raise DownloadError(
            f'expected an intact file at {path}, found another one: {source} says that its SHA-256 begins with '
            f'{expected}, found {found[: len(expected)]}; delete it to download it again'
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _download_from_drive(address: str, folder: Path) -> Path:
    """Downloads a file from Google Drive into a folder of its own, and goes on where a download was interrupted.

    Raises:
        DownloadError: gdown is missing or too old, or Google Drive does not give the file out.
    """
    purpose = f'downloads from Google Drive: pip install "{GDOWN}"'
    try:
        import gdown  # an extra
        from filelock import FileLock  # which gdown requires
    except ModuleNotFoundError as error:
        raise DownloadError(f'{error}, which {purpose}') from error
    found, expected = (tuple(map(int, number.split('.')[:2])) for number in (gdown.__version__, GDOWN.split('>=')[1]))
    if found < expected:
        raise DownloadError(f'found gdown {gdown.__version__}, expected a later one, which {purpose}')

    folder.mkdir(exist_ok=True)
    with FileLock(folder / '.lock'):  # two runs would write into the same unfinished file
        path = only_file(folder)
        if path is not None:
            return path
        try:
            return Path(gdown.download(id=drive_id(address), output=f'{folder}/', resume=True, timeout=60, retries=2))
        except gdown.DownloadError as error:
            refused = 'Google Drive does not give the file out: ' * isinstance(error, gdown.FileURLRetrievalError)
            parts = ', '.join(str(part) for part in folder.glob('*.part'))
            begun = f' (unfinished, delete it to begin anew: {parts})' if parts else ''
            raise DownloadError(f'{refused}{" ".join(str(error).split())}{begun}') from error
