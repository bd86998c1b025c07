"""Downloads of checkpoints into PyTorch's folder: one file for each address, checked by the hash in its name."""

import hashlib
import re
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch
from mmengine import dist

HASH = re.compile(r'-(?!(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\.)([0-9a-f]{8,64})\.[^.]+$')
"""The beginning of the SHA-256 of a file, at the end of its name, as PyTorch and OpenMMLab write it; no date."""


def download(address: str) -> Path:
    """Returns the file of an address, which the process of rank 0 downloads if it is not there yet.

    A name with a hash is unique, and lies where ``torch.hub`` puts it. Any other lies in a folder whose name is made
    from the address. Where a node does not share its files with that of rank 0, its processes download for themselves.

    Raises:
        RuntimeError: On every rank, if the file cannot be downloaded or is not the one that its name says.
    """
    path = cached(address)
    failures = [_fetch(address, path) if dist.get_rank() == 0 else '']
    dist.broadcast_object_list(failures)
    if not failures[0]:
        failures = dist.all_gather_object(_fetch(address, path))
    if any(failures):
        raise RuntimeError(next(filter(None, failures)))
    return path


def cached(address: str) -> Path:
    """Returns where the file of an address lies once it is downloaded."""
    name = Path(unquote(urlparse(address).path)).name
    folder = Path(torch.hub.get_dir(), 'checkpoints')
    return folder / name if HASH.search(name) else folder / hashlib.sha256(address.encode()).hexdigest()[:8] / name


def check_name(path: Path) -> None:
    """Raises a ValueError if the SHA-256 of a file does not begin as its name says."""
    match = HASH.search(path.name)
    if not match:
        return
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    if not digest.hexdigest().startswith(match[1]):
        raise ValueError(f'its name says that its SHA-256 begins with {match[1]}, found {digest.hexdigest()[:8]}')


def _fetch(address: str, path: Path) -> str:
    """Downloads a file unless it is there; returns what went wrong, for which other processes wait, or ''."""
    if path.exists():
        return ''
    match = HASH.search(path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(path), hash_prefix=match[1] if match else None)
    except Exception as error:
        return f'{type(error).__name__}: {error}'
    return ''
