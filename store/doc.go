// Package store is etcd: the records and their keys, a cache of them that is kept by a watch, the snapshot that an agent plans from,
// leases, locks, and the transactions that change them.
//
// It owns every key below the prefix of its Client ("/egret/" unless told otherwise), and nothing in the kernel. The keys are in
// keys.go; the values are the records of package egress as JSON, written by Encode alone, so that equal records are equal bytes.
//
// Invariants:
//   - A Cache shows etcd as it was at one revision, over all its ranges: what one transaction changed is seen together.
//   - An error never empties a Cache, and a record that cannot be read never hides an older one that could.
//   - Every transaction that changes an owner, a move, or what crdsync writes is fenced: by the mod revision of what it was decided
//     upon, or by the election key. A stale decision changes nothing.
//   - Lease.Valid never names a time at which etcd may have dropped the lease by itself: it counts from when the confirmed request
//     was sent. Whoever revokes another's lease knows what that does.
//
// It decides nothing: who claims, moves and allocates what is the business of plan, agent and crdsync. Transactions are tried once;
// trying again is up to the caller's loop. One that ended with an error may have been done all the same: look at the records.
package store
