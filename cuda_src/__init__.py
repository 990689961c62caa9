"""The CUDA C++ templates, imported as ``rtk.cuda_src``. A package only so that an installed rtk finds its headers."""
