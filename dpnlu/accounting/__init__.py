"""From what was released to ε, and back. Needs no torch."""

from dpnlu.accounting.accountants import ACCOUNTANTS as ACCOUNTANTS
from dpnlu.accounting.accountants import epsilon as epsilon
from dpnlu.accounting.calibration import calibrate_noise_multiplier as calibrate_noise_multiplier
from dpnlu.accounting.confirmation import SecondOpinion as SecondOpinion
from dpnlu.accounting.confirmation import UnconfirmedError as UnconfirmedError
from dpnlu.accounting.confirmation import confirm as confirm
from dpnlu.accounting.events import SampledGaussian as SampledGaussian
from dpnlu.accounting.events import check_delta as check_delta
from dpnlu.accounting.events import check_digits as check_digits
from dpnlu.accounting.groups import group_epsilon as group_epsilon
