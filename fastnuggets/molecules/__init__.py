"""Molecules in, coordinates out: files, conformers, the coordinate table, ragged batches and stored grids.

Needs the extra ``fastnuggets[molecules]`` as soon as a file is touched; ``Molecules`` itself needs only torch.
"""

from fastnuggets.molecules.batch import BONDI_RADII, ELEMENTS, Molecules, atomic_numbers, bondi_radii
from fastnuggets.molecules.embedding import Conformer, conformers
from fastnuggets.molecules.fingerprints import Fingerprints, fingerprints_of_file
from fastnuggets.molecules.grids import GridInfo, Grids, GridWriter, open_grids
from fastnuggets.molecules.readers import Record, count_records, read, read_smiles
from fastnuggets.molecules.smiles import SmilesFile, smiles_of_file
from fastnuggets.molecules.table import iter_table, load_table, save_table
from fastnuggets.molecules.vocabulary import Strings, Vocabulary

__all__ = [
    "BONDI_RADII",
    "ELEMENTS",
    "Conformer",
    "Fingerprints",
    "GridInfo",
    "GridWriter",
    "Grids",
    "Molecules",
    "Record",
    "SmilesFile",
    "Strings",
    "Vocabulary",
    "atomic_numbers",
    "bondi_radii",
    "conformers",
    "count_records",
    "fingerprints_of_file",
    "iter_table",
    "load_table",
    "open_grids",
    "read",
    "read_smiles",
    "save_table",
    "smiles_of_file",
]
