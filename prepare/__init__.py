"""One script per data set or model, and the modules that they share."""
