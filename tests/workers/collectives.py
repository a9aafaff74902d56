"""Run by test_bench.py on 2 ranks: gather and scatter_sum against values by hand."""

from __future__ import annotations

import torch

from sculpt_dist.engine.group import Group

group = Group()
own = torch.arange(3.0) + 10 * group.rank
assert group.gather(own, torch.empty(6)).tolist() == [0, 1, 2, 10, 11, 12]
whole = torch.arange(6.0) * (group.rank + 1)
assert group.scatter_sum(whole, torch.empty(3)).tolist() == [
    3 * value for value in range(3 * group.rank, 3 * group.rank + 3)
]
print("as by hand", flush=True)
