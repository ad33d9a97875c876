package worker

import "context"

// Main is the life of a worker: what the program does when it is started by a [Pool]. It returns the exit status.
func Main(ctx context.Context) int { return 2 }
