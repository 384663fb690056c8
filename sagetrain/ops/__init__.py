"""The attention itself, which needs torch alone: functional.py is what users call, library.py its torch.library ops,
schemes.py the table of what can compute it, reference.py all of it in plain torch."""
