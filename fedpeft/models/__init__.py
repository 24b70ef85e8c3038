"""Load the pre-trained classifier that a user names; what does not fit is found out here."""

from fedpeft.models.choice import ModelSection as ModelSection
from fedpeft.models.choice import locate as locate
from fedpeft.models.embedding import embed as embed
from fedpeft.models.loading import Loaded as Loaded
from fedpeft.models.loading import is_large_model as is_large_model
from fedpeft.models.loading import kernels as kernels
from fedpeft.models.loading import load as load
from fedpeft.models.quantising import check_bits as check_bits
from fedpeft.models.tokens import READS_FIRST as READS_FIRST
from fedpeft.models.tokens import spare_last_block as spare_last_block
