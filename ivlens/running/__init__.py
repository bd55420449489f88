"""Tokens in, numbers out: batches, masks, replay, decoding, where an injection lands, and scores of answers."""
