"""The pipeline that turns a checkpoint and a plan into a smaller checkpoint, and its quality gate."""

from tailorbird.callable_module import make_callable

make_callable(__name__)
