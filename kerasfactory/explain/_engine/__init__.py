"""The engine room: what the verbs are made with. Nothing here imports a verb."""
