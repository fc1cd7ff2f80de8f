"""One file per dimension; apply.py alone knows them all."""
