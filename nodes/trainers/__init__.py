"""What trains a model on a device, one file a trainer; see :mod:`nodes.trainers._trainer`."""
