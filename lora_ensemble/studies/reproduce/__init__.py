"""Both reports, one command each: ``lora-ensemble reproduce oyeniyi|tolkunov``.

It starts sweeps as processes of their own, and reads what they left in the pool as dicor does.
"""
