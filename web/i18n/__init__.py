"""Owns every text that people read on the page, in English and Chinese.
It may not know Streamlit or any other room.
"""
