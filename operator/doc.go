// Package operator is what the operator's commands do: Get prints what etcd holds as tables, JSON or YAML, Move asks for a planned
// move and watches it happen. It speaks to etcd alone, so it works while the Kubernetes API is down.
//
// It owns the keys moves/<ip>, each bound to a lease of its own, so that a request does not outlive the patience of who made it.
package operator
