"""The broker: decides who holds which GPU. `core` decides, `policies` rank, `server` talks, `journal` survives it."""
