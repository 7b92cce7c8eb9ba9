"""The command `grpc`: the Open Inference Protocol over gRPC, before a server that speaks it over HTTP."""
