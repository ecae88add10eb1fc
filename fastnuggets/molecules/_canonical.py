"""Canonical SMILES of a block, and the loop of the process that writes them.

Started as a script by path, so that a worker loads RDKit alone and neither torch nor the caller's __main__.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Sequence


def compute(texts: Sequence[str]) -> list[str]:
    """The SMILES as ``fastnuggets.molecules.read`` gives them; empty where RDKit cannot read one."""
    from rdkit import Chem, rdBase

    found = []
    with rdBase.BlockLogs():
        for text in texts:
            try:
                mol = Chem.MolFromSmiles(text)
                found.append("" if mol is None else Chem.MolToSmiles(Chem.RemoveHs(mol, sanitize=False)))
            except (ValueError, RuntimeError):
                found.append("")
    return found


def serve() -> None:
    """Answer pickled blocks from stdin on stdout until stdin ends."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else prints must not get between the replies
    while True:
        try:
            task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(compute(task), replies)
        replies.flush()


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules must not stand in for others of the same name
    serve()
