"""What the papers compare zero-init attention with, on the same hosts; `methods.py` lists it.

Each module puts parameters on a host by torch's hooks or PEFT, and gives back how to undo that.
"""
