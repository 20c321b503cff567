// Package plan decides what a node does, from a snapshot of etcd and the facts of the node: which egress IPs it tries
// to own (Claims), which locks it gives back (Releases), which planned moves it takes part in (Arrivals, Departures),
// whose leases it revokes (Revocations), and what its kernel has to have (Build). Start with Cluster, the indexed
// snapshot, and Role, what a node does for an egress IP.
//
// Every function is pure: no I/O, no clock, no logging, and equal arguments give equal results on every node, so that
// nodes agree on who is first in rank without talking to each other. What a function returns is sorted. The package
// owns nothing; the agent (packages agent and ownership) acts on what it says.
package plan
