"""Studies over the package: what each part brings."""
