"""What stands between strangers and the model: bodies, images and connections are bounded before they cost anything."""
