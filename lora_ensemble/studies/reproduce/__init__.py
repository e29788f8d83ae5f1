"""Both reports, one command each: ``lora-ensemble reproduce oyeniyi|tolkunov``.

It sweeps part after part in one process, and reads what that left in the pool as dicor does.
"""
