"""`python -m raygard.schemas`: rewrite the shipped JSON Schemas from the typed models."""

from raygard.schemas import write

for path in write():
    print(path)
