"""What a program would cost on TPUs that are not here: compiled by their own compiler, without a device."""
