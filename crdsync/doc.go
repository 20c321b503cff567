// Package crdsync mirrors the Kubernetes API into etcd, and the outcome back into the status of the objects. It is the only part that
// speaks to the Kubernetes API, so nothing in the traffic path notices when that is down.
//
// Into etcd go pools, egresses, nodes, and the pods that each egress selects, per node; it allocates the egress IPs, the ids that
// stand for them on the wire, the nodes' indexes, and, with a block size, ports of the egress IPs to nodes (ports.go). It owns these keys
// (docs/design.md has the schema), counters/ids, counters/indexes and compaction besides, and nothing in the kernel. Back go the status of Egress and ExternalIPPool, and Events of what changed in an Egress's.
//
// Any event only marks something dirty. One goroutine then compares what the objects ask for with what a cache of etcd shows, and
// writes the difference: of a pod, that of its node; of an object or a record, that of everything. Several replicas run; an election in
// etcd picks the one that writes. All of them serve the webhook (package admission); package spec says what is wrong with an object.
//
// Invariants:
//   - etcd is the record: what was allocated is read there, never remembered. A new replica, or one that is restarted, takes over
//     every allocation, and a steady state writes nothing.
//   - Nothing is written before all objects and all of etcd were read once. An error never causes a delete: of an object that cannot
//     be read, what etcd holds stands, and the others go on.
//   - Every write is fenced twice: by the election, and by the revision of the record that it was decided upon.
//   - The two records of an egress's pods on a node change in one transaction, together with the node's blocks of ports.
//   - No two blocks of ports of an IP overlap in etcd, and a port that was a node's rests before it is another's (blocks.go).
//   - An address that is released is given out again only after etcd shows that it is free.
//   - What is told by an Event follows from the status before and after a write, so a change is told once, however often crdsync restarts.
//   - The status is compared and written by workers of its own: neither an API server that does not answer nor thousands of statuses hold up a
//     write to etcd.
//   - What etcd refuses for good holds up only what must come after it: a change of the same address.
//
// The leader also looks after etcd (housekeeping.go): it compacts, defragments where that pays, and makes room where etcd is full. Where etcd is
// full and nobody leads, since nobody can be elected there, any replica does that; all of it is harmless when two do.
//
// It does not choose the node of an egress IP (agents do), and it touches neither the spec of an object nor a Pod or Node.
package crdsync
