"""Sounds from file to model input: decoding, log-mel features, clips of one length, statistics, masking, caching."""
