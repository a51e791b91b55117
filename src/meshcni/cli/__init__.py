"""`meshcni`: the people's command line."""
