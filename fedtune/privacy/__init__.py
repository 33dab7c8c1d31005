"""What protects rows or clients, what it costs, and the proof of it.

mechanism.py   what the recipe promises, resolved: the same at clients and coordinator
accounting.py  events, and what they cost: epsilon
calibration.py the noise that an epsilon needs, and what it does to the signal
noise.py       Gaussian noise from a secret key: a round that is repeated repeats its noise
clipping.py    the bound on what one client can change
central.py     the noisy sum at the coordinator
ledger.py      what was charged, one chained and signed line after another
secure.py      whether the coordinator sees updates or their sum only
protocol.py    a client's side of secure aggregation; stages.py what it keeps between the legs
unmasking.py   the coordinator's side
letters.py     what both write and sign; identity.py who is who
ring.py        numbers as words that add up; masks.py what hides them; sharing.py secrets in parts
"""
