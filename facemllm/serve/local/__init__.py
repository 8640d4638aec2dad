"""Production on this machine: a proxy on its port, the model servers behind it, and the switch from one to another."""
