"""The command line `facemllm`."""

from facemllm.errors import interrupted_in_one_line

interrupted_in_one_line()  # before what takes seconds to load
