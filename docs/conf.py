"""Sphinx configuration of the documentation site; ``make docs`` builds it into ``work_dirs/site``.

Sphinx with MyST, as the toolboxes of OpenMMLab have it: docstrings are reStructuredText, pages Markdown. Signatures and
docstrings come from the installed package.
"""

from pathlib import Path

import yaml

import mmspatialmamba
from mmspatialmamba.checkpoint_names import SPATIAL_MAMBA, VMAMBA, NameTable

METAFILE = Path(__file__).parents[1] / 'configs' / 'metafile.yml'


def zoo_table(models: list[dict], task: str) -> str:
    """Returns the metafile's models whose first task is ``task`` as a Markdown table, a row for each."""
    models = [model for model in models if model['Results'][0]['Task'] == task]
    metrics = [
        {name: value for result in model['Results'] for name, value in result['Metrics'].items()} for model in models
    ]
    names = list(dict.fromkeys(name for found in metrics for name in found))
    sizes = ', '.join(dict.fromkeys(model['Metadata']['Input Size'] for model in models))
    headers = [name.replace('(', ' (') for name in names]  # which lets them wrap
    rows = [['config', *headers, 'parameters, M', f'GFLOPs at {sizes}', 'schedule', 'weights']]
    for model, found in zip(models, metrics, strict=True):
        meta = model['Metadata']
        schedule = f'{meta["Epochs"]} epochs' if 'Epochs' in meta else f'{meta["Iterations"] // 1000}k steps'
        rows.append(
            [
                f'`{Path(model["Config"]).name}`',
                *(f'{found[name]:.1f}' if name in found else '–' for name in names),
                f'{meta["Parameters"] / 1e6:g}',
                f'{meta["FLOPs"] / 1e9:g}',
                schedule,
                f'[file]({model["Weights"]})',
            ]
        )
    return markdown_table(rows)


def markdown_table(rows: list[list[str]]) -> str:
    """Returns rows of cells, the header first, as a Markdown table."""
    return '\n'.join(f'| {" | ".join(row)} |' for row in [rows[0], ['---'] * len(rows[0]), *rows[1:]])


def names_table(names: NameTable) -> str:
    """Returns the names of a backbone's parameters, original and own, as a Markdown table."""
    return markdown_table([['original', 'here'], *([f'`{official}`', f'`{own}`'] for official, own in names.pairs)])


project = 'mmspatialmamba'
author = project_copyright = 'the mmspatialmamba authors'
version = release = mmspatialmamba.__version__

extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx_copybutton']
exclude_patterns = ['jupyter_execute']
root_doc = 'index'

myst_enable_extensions = ['substitution']
myst_heading_anchors = 3
_models = yaml.safe_load(METAFILE.read_text())['Models']
myst_substitutions = {
    'detection': zoo_table(_models, 'Object Detection'),
    'segmentation': zoo_table(_models, 'Semantic Segmentation'),
    'classification': zoo_table(_models, 'Image Classification'),
    'names': names_table(SPATIAL_MAMBA),
    'vmamba_names': names_table(VMAMBA),
}
nb_execution_mode = 'off'  # tests/test_docs.py executes the notebook

default_role = 'py:obj'  # single backticks in docstrings: a link where the name is documented, code elsewhere
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
autodoc_member_order = 'bysource'
add_module_names = False
copybutton_exclude = '.linenos, .gp, .go'

html_theme = 'furo'
html_static_path = ['_static']
html_css_files = ['tables.css']
html_title = 'Spatial-Mamba and VMamba for OpenMMLab'
