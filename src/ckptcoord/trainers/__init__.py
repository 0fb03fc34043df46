"""Trainers that declare what they hold; and the parts they are made of."""
