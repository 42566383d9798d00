"""The Studio: make pictures with trained deltas and train new ones in a browser, on this machine and offline.

`settings` what it may read and write, `engine` the base and its drawing, `jobs` trainings in processes of their own,
`uploads` strangers' files, `guard` who may talk to it, `create` and `train` the two tabs, `look` the style sheet,
`app` builds and serves.
"""
