"""By which loss? One file per objective; each is computed on the response positions alone."""
