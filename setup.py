"""What pyproject.toml cannot say: the kernels' sources travel inside the package, and a wheel that
carries a built library is one for this platform (though for every Python)."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
log = logging.getLogger(__name__)
PREBUILT = ROOT / "flashmla" / "cuda" / "prebuilt"  # `flashmla build --prebuilt` fills it


class BuildWithSources(build_py):
    """Copies csrc/ to flashmla/csrc, where an installed package finds it at first use."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # a checkout has csrc/ beside the package already
            target = Path(self.build_lib) / "flashmla" / "csrc"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", target)


class PlatformWheel(bdist_wheel):
    """A library bound through DLPack has no Python ABI in it, so only the platform is named."""

    def run(self) -> None:
        super().run()
        if self.root_is_pure:
            log.warning(
                "flashmla: this wheel holds no library and compiles at first use; for one that "
                "does, python -m flashmla build --prebuilt in the checkout comes first"
            )

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


class PlatformDistribution(Distribution):
    """Belongs to a platform as soon as a built library lies in the tree."""

    def has_ext_modules(self) -> bool:
        return any(PREBUILT.glob("*.so"))


setup(
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildWithSources, "bdist_wheel": PlatformWheel},
)
