"""The kinds of models. Each module but `base` is one kind; what they share lies in `shared`."""

import os

for library in ("DIFFUSERS", "TRANSFORMERS"):  # before their import, or they hint at packages that nobody needs
    os.environ.setdefault(f"{library}_VERBOSITY", "error")
