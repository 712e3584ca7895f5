"""What a stage trains: one class a stage, each an `engine.task.Task`."""
