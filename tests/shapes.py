"""The type checker of the tests: beartype, with an int welcome wherever a float is."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
