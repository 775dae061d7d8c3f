"""For all tests: small models run no faster on many threads, and far slower on a busy machine."""

import torch

torch.set_num_threads(min(2, torch.get_num_threads()))
