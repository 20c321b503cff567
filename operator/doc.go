// Package operator is what the operator's commands do. Get, Describe, History, Status, Trace and Who print what etcd
// has, and what follows from it; Move asks for a planned move and waits for it, and may pin the IP; Cordon and Drain
// empty a node. It speaks to etcd alone (Who and Trace also to agents), so it works while the Kubernetes API is down.
//
// It owns the keys pins/<ip>, cordons/<node> and acts/, and the records of moves/<ip> that it asks for: each of these
// is bound to a lease of its own, so that a request ends when the command does, or when its time is up. Acts are kept
// for 90 days.
package operator
