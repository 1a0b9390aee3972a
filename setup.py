"""Builds the native kernels where there is a compiler; without one the package works through PyTorch."""

from glob import glob

from setuptools import Extension, setup

SOURCES = "src/tailorbird/kernels/cpp/"

setup(
    ext_modules=[
        Extension(
            "tailorbird.kernels._native",
            [SOURCES + "library.cpp"],
            depends=glob(SOURCES + "*"),
            extra_compile_args=["-O3", "-g0", "-std=c++17", "-fopenmp", "-Wno-psabi"],
            extra_link_args=["-fopenmp"],
            language="c++",
            optional=True,
        )
    ]
)
