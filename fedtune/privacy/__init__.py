"""What protects rows or clients, what it costs, and the proof of it.

mechanism.py   what the recipe promises, resolved: the same at clients and coordinator
accounting.py  events, and what they cost: epsilon
calibration.py the noise that an epsilon needs
forecast.py    epsilon round by round, and the noise beside the signal, before a run
noise.py       Gaussian noise from a secret key: a round that is repeated repeats its noise
normal.py      quantiles of the normal distribution, the same bits everywhere
clipping.py    the bound on what one client can change
steps.py       noisy steps inside a client (record mode)
central.py     the noisy sum at the coordinator (client mode)
ledger.py      what was charged, one chained and signed line after another
spending.py    what a ledger's lines add up to
verifying.py   the same recomputed, and compared with the run
certificate.py what a run promises, for a review board
secure.py      whether the coordinator sees updates or their sum only
protocol.py    a client's side of secure aggregation; stages.py what it keeps between the legs
unmasking.py   the coordinator's side
letters.py     what both write and sign; identity.py who is who
ring.py        numbers as words that add up; masks.py what hides them; sharing.py secrets in parts
"""
