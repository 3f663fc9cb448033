"""The client's connection, authentication, and the log with its line for each request.

May not know what a request asks for, nor the model.
"""
