"""Package map: the top-level folders ``kernels/`` and ``loaders/`` install as parts of ``rocket_fast``.

Everything declarative lives in pyproject.toml; only the computed package list needs code.
"""

from setuptools import find_packages, setup

# Folder on disk -> name after installation. Nobody imports top-level ``kernels``: another project owns that name.
ROOMS = {"rocket_fast": "rocket_fast", "kernels": "rocket_fast.kernels", "loaders": "rocket_fast.loaders"}

package_dir = {installed: folder for folder, installed in ROOMS.items()}
packages = [
    name
    for folder, installed in ROOMS.items()
    for name in [installed, *(f"{installed}.{sub}" for sub in find_packages(folder))]
]

# What the package reads. Files that only the sdist has (MANIFEST.in), such as the tables' build script, stay out.
package_data = {
    "rocket_fast": ["py.typed", "data/*.npy", "data/*.txt", "data/*.txt.xz", "data/*_LICENSE", "data/*.html"]
}

setup(packages=packages, package_dir=package_dir, package_data=package_data, include_package_data=False)
