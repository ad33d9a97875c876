package worker

import "errors"

// errSandbox means that this system cannot confine a worker as the configuration says.
var errSandbox = errors.New("the worker cannot be confined")
