"""``lora-ensemble serve``: a small HTTP service in front of an ensemble, and one page to try it.

``command`` has the options; ``app`` the routes, made of ``messages`` (what is asked and answered), ``batching`` (one
call for many clients) and ``guard`` (what holds for every request, metrics too); ``page/`` is sent as it is. FastAPI,
uvicorn and prometheus-client come with the extra ``serve``; nothing is imported here, so that the command's help is
quick.
"""
