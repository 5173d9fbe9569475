"""The package name `kernels` is also Hugging Face's: neither may be taken for the other."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

import kernels


def test_the_name_is_ours() -> None:
    """Our package is first on the path, and empty: transformers may import it while loading."""
    file = Path(kernels.__file__ or "")
    assert file == Path(__file__).parents[2] / "kernels" / "__init__.py"
    assert file.read_bytes() == b""


def test_no_distribution_has_the_name() -> None:
    """Hugging Face's package must not come in as a dependency."""
    with pytest.raises(PackageNotFoundError):
        distribution("kernels")


def test_the_libraries_do_not_take_it_for_theirs() -> None:
    """Both libraries look for a package of that name and must find that it is not the one they mean."""
    check = (
        "from transformers.utils.import_utils import is_kernels_available as a\n"
        "from diffusers.utils.import_utils import is_kernels_available as b\n"
        "raise SystemExit(int(a() or b()))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False, timeout=240).returncode == 0
