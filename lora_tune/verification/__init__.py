"""A finished trial trained again by plain PEFT and torch, in a process of its own, and compared.

``task.py`` finds what to train, ``plain.py`` is the process that trains it, ``process.py`` starts that
process and follows it, ``compare.py`` sets the two beside each other. Only ``plain.py`` needs torch.
"""
