"""The one model: vision tower, projector, decoder, and the VLM that joins them."""
