"""Faces to conversations, one row of questions and answers an image; and conversations to others' formats."""
