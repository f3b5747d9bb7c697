"""How ddb is installed. It needs nothing but Python: from a checkout, bin/ddb runs without any of this."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "([^"]+)"$', (HERE / "ddb/__init__.py").read_text(), re.MULTILINE)[1]

setup(
    name="ddb",
    version=VERSION,
    description="A replicated key/value database in pure standard-library Python",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the ddb authors",
    license="MIT",
    python_requires=">=3.11",
    packages=["ddb"],
    package_data={"ddb": ["py.typed"]},
    install_requires=[],
    entry_points={
        "console_scripts": [
            "ddb = ddb.__main__:main",
            "ddb-node = ddb.node:main",
            "ddb-registry = ddb.registry:main",
        ]
    },
    zip_safe=False,
)
