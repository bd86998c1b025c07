"""Where the configs of this project are, in a checkout and in an installed wheel."""

from pathlib import Path

PACKAGE = Path(__file__).parent
FOLDER = next(
    (folder for folder in (PACKAGE / '.mim' / 'configs', PACKAGE.parent / 'configs') if folder.is_dir()),
    PACKAGE / '.mim' / 'configs',
)
"""In a wheel the first; in a checkout both, or only the second where Git makes text files of symbolic links."""


def config_path(name: str) -> str:
    """Returns the path of a config, for ``_base_ = [__import__('mmspatialmamba').config_path('mask_rcnn_sm_t.py')]``.

    Args:
        name: File name of the config, such as 'mask_rcnn_sm_t.py'.

    Raises:
        FileNotFoundError: There is no config of this name.
    """
    path = FOLDER / name
    if not path.is_file():
        known = ', '.join(sorted(config.name for config in FOLDER.glob('*.py')))
        raise FileNotFoundError(f'mmspatialmamba has no config {name!r}; it has {known}')
    return str(path)
