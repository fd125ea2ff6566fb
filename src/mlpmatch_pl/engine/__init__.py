"""From a composed configuration to a finished run: build, train, resume, log."""
