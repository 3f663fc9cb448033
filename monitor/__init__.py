"""The checker: readings and probes become evidence, evidence becomes a verdict. It talks to the API over HTTP only."""
