"""AGG in trainers that are not ours, each a script to run and to copy from."""

import warnings

warnings.filterwarnings("ignore", module="megatron")  # at import it names each optional GPU library that is missing
