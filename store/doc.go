// Package store is Egret's access to etcd: the keys and records, a cache of them that follows etcd by watches (Cache),
// the snapshot that an agent plans from (View), leases (Lease), locks of egress IPs (Claim, Release, HandOver),
// crdsync's election (Leadership), and what operators write.
//
// It owns every key below the prefix of its Client ("/egret/" by default), and nothing in the kernel. The keys are in
// keys.go; the values are the records of package egress as JSON, written by Encode alone, so that equal records are
// equal bytes.
//
// Invariants:
//   - A Cache shows etcd as it was at one revision, over all its ranges: what one transaction changed is seen together.
//   - An error never empties a Cache, and a record that cannot be read never hides an older one that could.
//   - Every transaction that changes an owner, a move, or what crdsync writes requires a fencing token: the mod
//     revision of the record that it was decided upon, or the create revision of the election key. A stale decision
//     changes nothing.
//   - Lease.Valid never names a time at which etcd may have dropped the lease by itself: it counts from when the
//     confirmed request was sent. Whoever revokes another's lease knows what that does.
//
// It decides nothing: who claims, moves and allocates what is the business of plan, agent and crdsync. Transactions are
// tried once; trying again is up to the caller's loop. One that ended with an error may have been done all the same:
// look at the records.
package store
