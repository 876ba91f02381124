"""Parts of the gateway's measurement."""
