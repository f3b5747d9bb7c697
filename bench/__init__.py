"""How fast it is, measured from outside: a load generator and a cluster to point it at."""
