// Package operator is what the operator's commands do: Get and History print what etcd holds as tables, JSON or YAML, Move asks for a
// planned move and watches it happen, Cordon and Drain empty a node. It speaks to etcd alone, so it works while the Kubernetes API is down.
//
// It owns the keys pins/<ip> and cordons/<node>, and those of moves/<ip> that it asks for: each is bound to a lease of its own, so that a
// request does not outlive the patience of who made it.
package operator
