"""Reviews in, batches out: readers, table of hashes, lists of K, ArrayRecord, grain. Imports no models."""
