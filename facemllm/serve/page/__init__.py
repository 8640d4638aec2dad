"""The page of the model server: a picture in, answers out, for people. A door like the others."""
