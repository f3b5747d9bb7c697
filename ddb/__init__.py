"""ddb: a replicated key/value database in pure standard-library Python."""
