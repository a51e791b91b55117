# Stands in for collections, for the sake of collections.abc.
