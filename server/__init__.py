"""TorchServe on this machine: started with tokens, its own Java and temp folder; found and stopped by its place.

A server belongs to its run directory, the working directory that it is started in: TorchServe writes its tokens and
logs there. One directory holds one server; several live side by side on ports of their own.
"""
