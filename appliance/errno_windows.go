package appliance

// Appliances run Linux; these never see an error of theirs elsewhere.

func isFull(error) bool { return false }

func isUnreachable(error) bool { return false }
