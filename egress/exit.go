package egress

// ExitError is an error about one way out of a node, which the others do not depend on: that of the subnet whose
// packets carry Mark, or, where Mark is 0, that of all subnets on a VLAN.
type ExitError struct {
	Mark Mark
	VLAN int
	Err  error
}

func (e ExitError) Error() string { return e.Err.Error() }
func (e ExitError) Unwrap() error { return e.Err }
