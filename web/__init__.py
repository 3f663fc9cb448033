"""The page: asks about pictures in a browser. It reaches the model only over HTTP and never imports `api`."""
