// Package crdsync copies what the Kubernetes API has to etcd, where the agents read it, and what the agents did back
// into the status of the objects. It and the controller of certificates (package credentials) alone speak to the
// Kubernetes API, so nothing in the traffic path notices when that is down.
//
// Into etcd go pools, egresses, nodes, and the pods that each egress selects, per node. It allocates the egress IPs,
// the ids that stand for them in packets, the nodes' indexes, and, with a block size, ports of the egress IPs to nodes
// (ports.go). It owns these keys, and counters/ids, counters/indexes, compaction and told/ (docs/design.md has the
// schema); it owns nothing in the kernel. Back go the status of Egress and ExternalIPPool, and Events.
//
// The main loop (mirror.go) is a reconciler. An event of the API server or of etcd only marks something dirty. One
// goroutine then compares what the objects ask for with what a cache of etcd shows, and writes the difference: after an
// event of a pod, that of its node; after one of another object or record, that of all. One such comparison is a pass.
// Several replicas run; an election in etcd picks the one that writes. All of them serve the webhook (package
// admission); package spec says what is wrong with an object.
//
// Invariants:
//   - etcd is the record: what was allocated is read there, never remembered. A new replica, or one that is restarted,
//     takes over every allocation, and a steady state writes nothing.
//   - Nothing is written before all objects and all of etcd were read once. An error never causes a delete: of an
//     object that cannot be read, what etcd holds stands, and the others go on.
//   - Every transaction requires that the election key is still this replica's (the fencing token), and a change that
//     was decided upon a record also that the record has the same revision.
//   - The two records of an egress's pods on a node change in one transaction, together with the node's blocks of
//     ports.
//   - No two blocks of ports of an IP overlap in etcd, and a port that was a node's rests before it is another's
//     (blocks.go).
//   - An address that is released is given out again only after etcd shows that it is free.
//   - Each change has one Event, however often crdsync restarts: a record in etcd says which Events there were
//     (events.go).
//   - The status is compared and written by workers of its own: neither an API server that does not answer nor
//     thousands of statuses hold up a write to etcd.
//   - A change that etcd refuses for good holds up only changes of the same address.
//
// The leader also looks after etcd (housekeeping.go): it compacts, defragments where that pays, and frees space where
// etcd is full. In a full etcd nobody can be elected: where nobody leads, any replica frees space; it does no harm when
// two do.
//
// It does not choose the node of an egress IP (agents do), and it touches neither the spec of an object nor a Pod; of a
// Node it takes away at most its own startup taint.
package crdsync
