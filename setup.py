"""The configuration is in pyproject.toml."""

import shutil

from setuptools import setup

# What an earlier build left there would go into the wheel too, modules since deleted among it.
shutil.rmtree("build/lib", ignore_errors=True)
setup(script_name="setup.py")  # the root is the package: this names the file that is no module of it
