"""The long job with its tools, for workers that serve everything."""

from long_job import Tally, long_job
from long_job_tools import fold, square

__all__ = ["Tally", "fold", "long_job", "square"]
