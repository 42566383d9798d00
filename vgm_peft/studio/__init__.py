"""The Studio: make pictures with trained deltas and train new ones in a browser, on this machine and offline.

`settings` what it may read and write, `engine` the base and its drawing, `shelf` names and places, `uploads` strangers' files,
`guard` who may talk to it, `look` the style sheet, `app` builds and serves. The tabs: `create`, whose parts are `*_panel` and
`history`, with the fields `rows` and `sketch` that `web/` brings; `library` over `catalogue` (what files are) and `workbench`
(export, merge, resize); `train` over `jobs` (the queue), `tickets` (its files), `trainer` (the process of one training),
`wishes` (what can be asked for), `preflight` and `metrics`; `compare`.
"""
