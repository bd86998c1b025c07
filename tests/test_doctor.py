"""The environment doctor prints versions, providers and backends."""

import re
import subprocess
import sys


def test_doctor_reports_the_environment():
    result = subprocess.run([sys.executable, '-m', 'mmspatialmamba'], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for line in (
        r'^mmengine: (onedl-)?mmengine \d',
        r'^mmcv: (onedl-)?mmcv \S+, with its ops$',
        r'^mmseg: (onedl-)?mmsegmentation \d',
        '^ops on cpu: ',
    ):
        assert re.search(line, result.stdout, re.MULTILINE)


def test_a_module_that_cannot_be_imported_is_named(tmp_path):
    (tmp_path / 'mmdet').mkdir()
    (tmp_path / 'mmdet' / '__init__.py').write_text('raise AssertionError("MMCV==9 is used but incompatible")')
    code = (
        f'import sys; sys.path.insert(0, {str(tmp_path)!r}); from mmspatialmamba.__main__ import main; sys.exit(main())'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert 'advice: mmdet cannot be imported (AssertionError: MMCV==9 is used but incompatible)' in result.stdout
