"""The page on which people ask about images, and the operator's console. It owns everything that Streamlit serves.

It reaches the model over HTTP only: it never imports `api`. Rooms import downwards: console, chat, history, images,
api_client, samples, i18n; `server` and `app` stand on top, `access` and `safe_text` beside the lower rooms.
"""
