"""rtk inside other libraries, one module each. None is imported, and none imports its library, before it is asked."""
