"""The version of this package and the gateway contract it speaks."""

__version__ = "0.1.0"
API = 1  # itwin.v1.GetVersionResponse.api
