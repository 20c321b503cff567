// Package egress is the vocabulary that every other part of Egret speaks: the records that etcd holds, the snapshot
// that an agent plans from, and the numbers that packets carry.
//
// All of it is values over net/netip. The package does no I/O, imports nothing but the standard library, and owns
// nothing in the kernel or in etcd.
package egress
