"""What the experts of a checkpoint specialise in: `python -m megatron_global_lbl.specialise SCRIPT ARGS`.

How to use it is in docs/specialisation.md.

| file | idea |
|---|---|
| `__main__.py` | the launcher: the user's own script and arguments, evaluation only |
| `arguments.py` | `--moe-lbl-domains`, and what makes an evaluation of a training's arguments |
| `measurement.py` | records Megatron's evaluation, sums over ranks |
| `similarity.py` | how alike experts are, and whether the router prefers those that say more |
| `result.py` | `specialisation.json`, and what follows from it |
| `summary.py` | the same in a few lines |

Its pictures are in `report/experts.py`.
"""
